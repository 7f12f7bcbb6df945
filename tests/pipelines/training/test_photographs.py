"""Training on photographs: what does not change its result, and what it says of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines import train
from pipelines.training import checkpoint
from tests.pipelines.training.disturbed import dying, equal

CACHES = {"decoded": 1024, "stored": 1, "stream": 0}


def trained(root: Path, storage: Path, **more: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a short run, and its last parameters."""
    result = train.run(train.make_config({
        "method": "dah", "dataset": str(root), "source": "photo", "target": "art", "network": "conv4", "bits": 16, "per_class": 4, "epochs": 2,
        "steps_per_epoch": 4, "views": "crop", "tracking": "none", "plots": False, "workers": 0, "threads": 1, "storage": str(storage),
    } | more))  # fmt: skip
    return storage / result["run_id"], parameters(storage / result["run_id"])


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a run's last checkpoint."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    return load_file(place / "model.safetensors")


def test_decoders_and_memory_do_not_change_a_run(photographs: Path, tmp_path: Path) -> None:
    _, plain = trained(photographs, tmp_path, cache_mb=CACHES["decoded"], decoders=0)
    for decoders in (1, 2, 4):
        assert equal(trained(photographs, tmp_path, cache_mb=CACHES["stored"], decoders=decoders)[1], plain)
    assert equal(*(trained(photographs, tmp_path, cache_mb=CACHES["stream"], decoders=decoders)[1] for decoders in (0, 2)))
    assert not equal(trained(photographs, tmp_path, seed=1)[1], plain)


@pytest.mark.parametrize("cache", CACHES)
def test_a_run_resumes_bit_identically_in_mid_epoch_with_other_decoders(
    photographs: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    _, plain = trained(photographs, tmp_path / "plain", cache_mb=CACHES[cache])
    with dying(monkeypatch):
        trained(photographs, tmp_path, cache_mb=CACHES[cache], checkpoint_steps=2, decoders=2)
    (run,) = [each.parent for each in tmp_path.glob("*/config.json")]
    latest = checkpoint.latest(run / "checkpoints")
    assert latest is not None and latest.name == "epoch-00001-step-00000002"
    train.run(train.make_config({"resume": run.name, "storage": str(tmp_path), "decoders": 0}))
    assert equal(parameters(run), plain)


def test_pseudo_labels_over_neighbouring_photographs_resume_bit_identically(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"method": "igan", "preset": "photographs", "pretrain_epochs": 1}
    _, plain = trained(photographs, tmp_path / "plain", **own)
    assert len(plain["guesses.classes"]) == 90 and len(plain["guesses.classes"].unique()) == 3
    with dying(monkeypatch):
        trained(photographs, tmp_path, checkpoint_steps=2, **own)
    (run,) = [each.parent for each in tmp_path.glob("*/config.json")]
    train.run(train.make_config({"resume": run.name, "storage": str(tmp_path)}))
    assert equal(parameters(run), plain)


def test_a_run_says_where_its_rows_are_and_how_its_time_divides(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained(photographs, tmp_path, cache_mb=1, profile=True, precision="bf16", epochs=1)
    told = capsys.readouterr().err
    assert "photo: 90 rows in memory as they are stored, " in told and "art: 90 rows in memory as they are stored, " in told
    assert "a step takes " in told and all(part in told for part in ("waiting for data", "transfer", "views", "forward", "backward", "optimiser"))
    assert "bf16 is for GPUs" in told
    (trace,) = (folder / "profile").iterdir()
    assert trace.stat().st_size > 10_000
    short, _ = trained(photographs, tmp_path, profile=True, steps_per_epoch=2)
    assert "too few steps for a trace" in capsys.readouterr().err and not (short / "profile").exists()
