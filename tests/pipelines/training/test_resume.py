"""Runs that die go on, and end with the parameters of a run that nothing disturbed, bit for bit."""

import contextlib
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data.batches import DomainLoader
from data.rows import DomainBatch
from models.method import Method
from models.methods.dah import DAH, DAHConfig
from pipelines import train
from pipelines.training import checkpoint, runs
from pipelines.training.loop import Trainer
from tests.pipelines.training.disturbed import EPOCHS, config, equal, final, wait_for_epoch
from tests.servers import ROOT, Head


def training_workers() -> list[psutil.Process]:
    """Ray's training workers among the processes of this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_driver_is_killed_and_then_a_worker_of_the_resumed_run(
    ray_cluster: Head, digits: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:  # fmt: skip
    script = (
        "import sys; from tests.pipelines.training.disturbed import config, train; from pathlib import Path; "
        "train.run(config(Path(sys.argv[1]), Path(sys.argv[2]), checkpoint_steps=2))"
    )
    arguments = [sys.executable, "-c", script, str(digits), str(tmp_path)]
    driver = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = wait_for_epoch(tmp_path)
    driver.kill()
    driver.wait()
    end = time.monotonic() + 60
    while training_workers() and time.monotonic() < end:
        time.sleep(0.2)
    before, killed = checkpoint.latest(folder / "checkpoints"), list[psutil.Process]()
    assert before is not None and before.name != f"epoch-{EPOCHS:05d}"

    def kill() -> None:
        while checkpoint.latest(folder / "checkpoints") == before:
            time.sleep(0.01)
        victim = training_workers()[0]
        victim.kill()
        if not (folder / "checkpoints" / f"epoch-{EPOCHS:05d}").exists():
            killed.append(victim)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train.run(train.make_config({"resume": folder.name, "storage": str(tmp_path)}))
    killer.join()
    assert killed and not killed[0].is_running()
    assert equal(final(folder), undisturbed)


def test_a_plain_process_resumes_bit_identically_past_a_damaged_checkpoint(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"workers": 0, "mmd_estimate": "linear"}
    whole = train.run(config(digits, tmp_path / "whole", **plain))
    part = train.run(config(digits, tmp_path / "part", **plain))
    folder = tmp_path / "part" / part["run_id"]
    kept = sorted((folder / "checkpoints").glob("epoch-*"))
    assert len(kept) == 2
    damage(kept[-1])
    train.run(train.make_config({"resume": folder.name, "storage": str(folder.parent)}))
    assert equal(final(folder), final(tmp_path / "whole" / whole["run_id"]))
    assert f"checkpoint {kept[-1]} is damaged and skipped" in capsys.readouterr().err
    for each in kept:
        damage(each)
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        train.run(train.make_config({"resume": folder.name, "storage": str(folder.parent)}))


def test_checkpoints_within_an_epoch_by_the_clock(digits: Path, plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / train.run(config(digits, tmp_path, workers=0, checkpoint_seconds=0.001))["run_id"]
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["epoch-00002-step-00000005", "epoch-00003"]
    shutil.rmtree(run / "checkpoints" / "epoch-00003")
    train.run(train.make_config({"resume": run.name, "storage": str(tmp_path)}))
    assert equal(final(run), plain)


def damage(place: Path) -> None:
    """Change a bit of a weight: the file can still be read."""
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (place / "model.safetensors").write_bytes(content)


def method(bits: int = 16) -> DAH:
    torch.manual_seed(0)
    return DAH(DAHConfig(pretrained="none"), (1, 16, 16), 3, bits)


def test_a_checkpoint_holds_the_optimiser(tmp_path: Path) -> None:
    one = method()
    optimizer = one.players["encoder"].optimizer
    sum(p.sum() for p in one.network.parameters()).backward()
    optimizer.step()
    place = checkpoint.write(tmp_path, checkpoint.snapshot(one, 4, {}))
    other = method()
    assert checkpoint.load(place, other) == (4, 0, {})
    left, right = optimizer.state_dict(), other.players["encoder"].optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for key, state in left["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][key][name])) for name, value in state.items())


def one_step(one: DAH) -> None:
    sum(p.sum() for p in one.network.parameters()).backward()
    one.players["encoder"].optimizer.step()


def test_moving_a_method_moves_its_optimisers_state() -> None:
    one = method()
    one_step(one)
    one.to(torch.float64)  # in place of a GPU
    states = one.players["encoder"].optimizer.state.values()
    assert states and all(state["exp_avg"].dtype == torch.float64 for state in states)
    one_step(one)


def test_a_run_is_restored_where_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = method()
    one_step(one)
    checkpoint.write(tmp_path, checkpoint.snapshot(one, 1, {}))
    monkeypatch.setattr(DAH, "to", lambda self, device: Method.to(self, torch.float64))  # in place of a GPU
    other = method()
    Trainer(other, None, None, 2, 1, 0, tmp_path, {}, print)
    states = other.players["encoder"].optimizer.state.values()
    assert states and all(state["exp_avg"].dtype == torch.float64 for state in states)
    one_step(other)


def test_a_checkpoint_of_another_method_or_a_torn_one_is_said(tmp_path: Path) -> None:
    place = checkpoint.write(tmp_path, checkpoint.snapshot(method(), 1, {}))
    with pytest.raises(ValueError, match="16 bits.*not of dah .32 bits"):
        checkpoint.load(place, method(bits=32))
    with pytest.raises(ValueError, match="of other settings or of another version .Error.* Missing key.*encoder.network.trunk"):
        checkpoint.load(place, DAH(DAHConfig(pretrained="none", norm=False), (1, 16, 16), 3, 16))
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(place, method())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoint.write(tmp_path, checkpoint.snapshot(method(), 1, {}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device.*the one before it is kept"):
        checkpoint.write(tmp_path, checkpoint.snapshot(method(), 2, {}))
    assert checkpoint.latest(tmp_path) == first and [each.name for each in tmp_path.iterdir()] == [first.name]


def test_a_process_killed_while_it_writes_a_checkpoint(digits: Path, plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from pipelines.training import checkpoint
from tests.pipelines.training.disturbed import config, train

def killing(tensors, path):
    saved(tensors, path)
    if "epoch-00002" in str(path):
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)

saved, checkpoint.save_file = checkpoint.save_file, killing
train.run(config(Path(sys.argv[1]), Path(sys.argv[2]), workers=0))
"""
    done = subprocess.run([sys.executable, "-c", script, str(digits), str(tmp_path)], cwd=ROOT, capture_output=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    (run,) = [each.parent for each in tmp_path.glob("*/config.json")]
    assert {each.name for each in (run / "checkpoints").iterdir()} == {"epoch-00001", ".partial-epoch-00002"}
    train.run(train.make_config({"resume": run.name, "storage": str(tmp_path)}))
    assert equal(final(run), plain)
    assert {each.name for each in (run / "checkpoints").iterdir()} == {"epoch-00002", "epoch-00003"}


def test_a_batch_with_a_value_that_is_no_number_ends_the_run_once(
    digits: Path, plain: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    drawn = DomainLoader.with_views

    def spoiled(self: DomainLoader, batch: DomainBatch, epoch: int, step: int) -> DomainBatch:
        made = drawn(self, batch, epoch, step)
        return made._replace(views=tuple(view * math.nan for view in made.views)) if (epoch, step) == (1, 4) else made

    with monkeypatch.context() as patched:
        patched.setattr(DomainLoader, "with_views", spoiled)
        with pytest.raises(FloatingPointError, match="failed in epoch 2: loss .* is not finite.*checkpoints up to epoch 1 are kept"):
            train.run(config(digits, tmp_path, workers=0))
    (run,) = [each.parent for each in tmp_path.glob("*/config.json")]
    assert [each.name for each in (run / "checkpoints").iterdir()] == ["epoch-00001"]
    train.run(train.make_config({"resume": run.name, "storage": str(tmp_path)}))
    assert equal(final(run), plain)


def test_a_loss_that_is_not_finite_ends_the_run(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="failed in epoch 1: loss .* is not finite"):
        train.run(config(digits, tmp_path, workers=0, learning_rate=1e30, optimizer="sgd", norm=False))


def test_the_follower_hands_over_each_record_once(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    progress = runs.ProgressWriter(tmp_path)
    progress({"epoch": 0})
    with runs.Follower(tmp_path, seen.append, interval=0.01):
        for epoch in range(1, 30):
            progress({"epoch": epoch})
    assert [record["epoch"] for record in seen] == list(range(1, 30))
