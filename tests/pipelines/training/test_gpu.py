"""Training, resuming and encoding on a GPU; without one these tests skip."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import DomainLoader
from data.manifest import Manifest
from data.transforms import VIEWS, random_view, seeded_generator
from models.registry import METHODS
from pipelines import train
from pipelines.retrieval.evaluation import MethodEncoder, encode_split, evaluate_run
from pipelines.training import checkpoint
from pipelines.training.restore import device_for, load_method
from pipelines.training.runs import read_progress
from pipelines.training.transfer import on_device
from tests.pipelines.training.disturbed import dying, equal
from tests.pipelines.training.test_photographs import parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPPED = [name for name, kind in METHODS.items() if not kind.fitted]


def options(root: Path, storage: Path, method: str, **more: Any) -> dict[str, Any]:
    """A short run on a GPU, of batches of few images."""
    kind = METHODS[method]
    small = {"per_class": 4} if hasattr(kind.Config, "per_class") else {}
    small |= {"batch": 16} if hasattr(kind.Config, "batch") else {}
    domains = {"source": "typeset", "target": "handwritten"} if root.name == "digits" else {"source": "photo", "target": "art"}
    return {
        "method": method, "dataset": str(root), "bits": 16, "epochs": 2, "steps_per_epoch": 4, "tracking": "none", "plots": False, "workers": 0,
        "gpu": True, "storage": str(storage),
    } | domains | small | more  # fmt: skip


def trained(root: Path, storage: Path, method: str, **more: Any) -> Path:
    """The folder of a run."""
    return storage / train.run(train.make_config(options(root, storage, method, **more)))["run_id"]


def interrupted(root: Path, storage: Path, method: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """The folder of a run that dies after the third step of its second epoch and is resumed from a checkpoint after the second step."""
    with dying(monkeypatch):
        trained(root, storage, method, checkpoint_steps=2, **more)
    (folder,) = [each.parent for each in storage.glob("*/config.json")]
    latest = checkpoint.latest(folder / "checkpoints")
    assert latest is not None and latest.name == "epoch-00001-step-00000002"
    train.run(train.make_config({"resume": folder.name, "storage": str(storage)}))
    return folder


@pytest.mark.parametrize("method", STEPPED)
def test_a_run_on_a_gpu_resumes_bit_identically(digits: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parameters(trained(digits, tmp_path / "plain", method))
    assert equal(parameters(trained(digits, tmp_path / "again", method)), plain), "two equal runs differ"
    assert equal(parameters(interrupted(digits, tmp_path / "stopped", method, monkeypatch)), plain), "the resumed run differs"


@pytest.mark.parametrize("more", [{"precision": "bf16"}, {"network": "efficientnet_lite0"}], ids=str)
def test_a_run_on_photographs_resumes_bit_identically(photographs: Path, tmp_path: Path, more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"network": "conv4", "views": "crop", "cache_mb": 0, "decoders": 2} | more
    plain = parameters(trained(photographs, tmp_path / "plain", "dah", **options))
    assert equal(parameters(interrupted(photographs, tmp_path / "stopped", "dah", monkeypatch, **options)), plain)


def test_batches_and_their_views_on_a_gpu_are_those_on_a_cpu(photographs: Path) -> None:
    manifest, gpu = Manifest.read(photographs), torch.device("cuda", 0)
    here, there = (DomainLoader(photographs, manifest, "photo", "train", 16, labels=True, cache_mb=0, decoders=2, pinned=pinned) for pinned in (False, True))
    moved = on_device(((batch,) for batch in there.epoch(0, 8)), gpu)
    for step, (plain, (batch,)) in enumerate(zip(here.epoch(0, 8), moved, strict=True)):
        assert batch is not None and batch.label is not None and plain.label is not None
        assert batch.x.is_cuda and torch.equal(batch.x.cpu(), plain.x)
        assert torch.equal(batch.label.cpu(), plain.label) and torch.equal(batch.row.cpu(), plain.row)
        for kind in VIEWS:
            views = [random_view(x, seeded_generator(step), kind=kind).cpu() for x in (plain.x, batch.x)]
            assert (views[0] - views[1]).abs().mean() < 0.05, kind  # of 255: a pixel on a sampling border may differ


def test_codes_and_figures_of_a_gpu_are_those_of_a_cpu(photographs: Path, tmp_path: Path) -> None:
    folder, manifest = trained(photographs, tmp_path, "dah", network="conv4"), Manifest.read(photographs)
    codes = [encode_split(MethodEncoder(load_method(folder, manifest, device_for(gpu))), photographs, manifest, "photo/train").codes for gpu in (False, True)]
    assert np.unpackbits(codes[0] ^ codes[1]).mean() < 0.002
    figures = [evaluate_run(folder, photographs, manifest, gpu=gpu)["metrics"] for gpu in (False, True)]
    assert figures[0].keys() == figures[1].keys() and "accuracy" in figures[0]
    assert all(abs(figures[0][name] - figures[1][name]) < 0.02 for name in figures[0])


def test_compiled_training_has_the_losses_of_plain_training(photographs: Path, tmp_path: Path) -> None:
    plain, compiled = (read_progress(trained(photographs, tmp_path, "dah", network="conv4", dropout=0.0, compile=on)) for on in (False, True))
    for here, there in zip(plain, compiled, strict=True):
        assert here["terms"] == pytest.approx(there["terms"], rel=0.05, abs=0.02)
