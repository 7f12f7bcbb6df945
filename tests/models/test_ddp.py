"""Two workers compute the gradients of one process, for every player of every method in every phase of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.registry import METHODS
from tests.models.players import CLASSES, PER_CLASS, build, trained, trained_by_two

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dah": ("dah", {"dropout": 0.0, "pseudo_threshold": 0.34}),
    "dah, linear mmd": ("dah", {"dropout": 0.0, "pseudo_threshold": 0.34, "mmd_estimate": "linear"}),
    "dpsh": ("dpsh", {"dropout": 0.0}),
    "igan": ("igan", {"dropout": 0.0, "threshold": 0.34, "pretrain_epochs": 0}),
    "igan, pretrained, in stages": ("igan", {"dropout": 0.0, "threshold": 0.34, "pretrain_epochs": 1, "real_unlabelled": False}),
    "igan, propagated": ("igan", {"dropout": 0.0, "pretrain_epochs": 1, "labels": "propagated", "smoothing": 0.1, "mmd_weight": 1.0}),
    "cph": ("cph", {"width": 16}),
    "sigan": ("sigan", {"pretrain_epochs": 1, "threshold": 0.34}),
    "sigan, as in the paper": (
        "sigan", {"pretrain_epochs": 1, "semantic_weight": 0.0, "label_interval": 2, "lipschitz": "clip", "source_weight": 0.0}
    ),
    "dtn": ("dtn", {"pretrain_epochs": 0}),
    "ae": ("idr-ae", {"matching": "none"}),
    "wgan-ae": ("idr-ae", {"matching": "critic"}),
    "ot-ae": ("idr-ae", {"matching": "assignment"}),
    "idr-ae": ("idr-ae", {}),
    "ucdir": ("ucdir", {"cluster_start": 0.0}),
    "ucdir, few slots": ("ucdir", {"cluster_start": 0.0, "negatives": 7}),
    "ucdir, slots of one worker": ("ucdir", {"cluster_start": 0.0, "negatives": 1}),
    "protoot": ("protoot", {"cross_start": 0.0, "cross_weight": 1.0}),
    "protoot, few slots": ("protoot", {"cross_start": 0.0, "negatives": 5}),
    "id": ("id", {}),
    "id, few slots": ("id", {"negatives": 5}),
    "protonce": ("protonce", {"cluster_start": 0.0, "clusters": 4}),
    "cds": ("cds", {}),
    "pcs": ("pcs", {"clusters": 4}),
    "sgh": ("sgh", {}),
    "ssdh": ("ssdh", {"left": 0.5, "right": 0.5}),
    "tca": ("tca", {"dropout": 0.0, "dimensions": 8}),
    "jda": ("jda", {"dropout": 0.0, "dimensions": 8, "rounds": 2}),
    "gfk": ("gfk", {"dropout": 0.0, "dimensions": 4}),
    "coral": ("coral", {"dropout": 0.0}),
    "dan": ("dan", {"dropout": 0.0}),
    "dann": ("dann", {"dropout": 0.0, "width": 8}),
    "cdan": ("cdan", {"dropout": 0.0, "width": 8}),
    "mstn": ("mstn", {"dropout": 0.0, "width": 8}),
    "adda": ("adda", {"dropout": 0.0, "width": 8}),
    "drcn": ("drcn", {"dropout": 0.0, "width": 4}),
    "cogan": ("cogan", {"dropout": 0.0, "width": 4}),
    "ucdir, resumed": ("ucdir", {"cluster_start": 0.0, "stop": 1}),
}  # fmt: skip


def test_every_method_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == {name for name in METHODS if build(name).players}  # the others are fitted by one process


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """The results of two processes for each case; they are started once."""
    return trained_by_two(CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES)
def test_two_workers_give_the_gradients_of_one(case: str, by_two: dict[str, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    """Including batch-norm, which uses the moments of the global batch."""
    name, own = CASES[case]
    alone = trained(name, own, tmp_path)
    assert all(any(f": {player}." in each for each in alone) for player in build(name).players)
    for found in by_two[case]:
        assert found.keys() == alone.keys()
        for each, whole in alone.items():
            tensor = whole[-len(found[each]) :] if whole.dim() else whole  # the second worker has the last part of what is divided
            error = (found[each].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-3)
            assert error < 1e-6, f"{each} differs by {error:.1e}"


def test_a_divided_memory_resumes_bit_identical(by_two: dict[str, list[dict[str, Tensor]]]) -> None:
    whole, part = by_two["ucdir, resumed"]
    assert len(whole["kept memory.source.slots"]) == 2 * len(part["kept memory.source.slots"]) == CLASSES * PER_CLASS
    for found, undisturbed in zip((whole, part), by_two["ucdir"], strict=True):
        assert all(torch.equal(tensor, undisturbed[each]) for each, tensor in found.items())
