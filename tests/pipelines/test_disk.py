"""Full disks, missing permissions and damaged files: one line, exit status 2, and nothing that looks complete."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import ingest
from pipelines.console.cli import main

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train dah --source typeset --target handwritten --tracking none --workers 0 --epochs 1 --steps-per-epoch 2 --per-class 2 --no-plots"


def said(line: str, *before: str) -> str:
    """Run a command in its own process, which must fail; returns its line."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "pipelines", *line.split()], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    messages = [text for text in done.stderr.splitlines() if text.startswith("hashbridge: ")]
    assert len(messages) == 1, done.stderr
    return messages[0]


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, ...]:
    """A command prefix that mounts a file system of 3 MiB at ``tmp_path/small`` and lists its remaining files in ``tmp_path/left``."""
    place = tmp_path / "small"
    place.mkdir()
    script = 'mount -t tmpfs -o size=3m tmpfs "$0" && "$@"; status=$?; cd "$0" && find . -type f > "$0/../left"; exit $status'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, str(place))
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no process mount a file system of its own")
    return prefix


def test_a_disk_that_fills_in_ingest(small: tuple[str, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", x_train=np.random.default_rng(0).integers(0, 256, (5000, 28, 28), np.uint8))
    message = said(f"ingest {tmp_path}/large.npz --dataset {tmp_path}/small/set", *small)
    assert "No space left on device" in message
    assert (tmp_path / "left").read_text() == ""


def test_a_disk_that_fills_in_a_checkpoint(small: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    message = said(f"{TRAIN} --dataset {digits} --storage {tmp_path}/small/runs", *small)
    assert "could not be written" in message and "No space left on device" in message
    assert "epoch-" not in (tmp_path / "left").read_text()


def obeying_permissions() -> tuple[str, ...]:
    """A command prefix that makes the superuser respect file permissions."""
    if os.geteuid():
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("the superuser may write everywhere, and there is no setpriv")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")


@pytest.mark.parametrize("line", ["ingest digits --dataset {locked}/set", TRAIN + " --dataset {digits} --storage {locked}/runs"])
def test_no_permission_to_write(line: str, digits: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    message = said(line.format(digits=digits, locked=locked), *obeying_permissions())
    assert "Permission denied" in message and str(locked) in message
    assert not list(locked.iterdir())


def test_no_permission_to_read(digits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "digits"))
    next(copy.glob("domain=typeset/split=train/*.parquet")).chmod(0)
    message = said(f"{TRAIN} --dataset {copy} --storage {tmp_path}/runs", *obeying_permissions())
    assert "Permission denied" in message or "cannot be read" in message


def test_an_unreadable_shard_at_training(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "digits"))
    shard = next(copy.glob("domain=handwritten/split=train/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert main(f"{TRAIN} --dataset {copy} --storage {tmp_path}/runs".split()) == 2
    message = [text for text in capsys.readouterr().err.splitlines() if text.startswith("hashbridge: ")]
    assert len(message) == 1 and shard.name in message[0]


def test_a_source_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    np.savez(tmp_path / "known.npz", x_train=images, y_train=np.arange(40) % 4)
    np.savez(tmp_path / "bare.npz", x_train=images)
    for name in ("known", "bare"):
        ingest.run(ingest.Config(str(tmp_path / f"{name}.npz"), dataset=str(tmp_path / "set")))
    line = f"train dah --dataset {tmp_path}/set --source bare --target known --tracking none --workers 0 --storage {tmp_path}/runs"
    assert main(line.split()) == 2
    assert "source 'bare' has no labels" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
