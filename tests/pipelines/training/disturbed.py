"""A short run that tests disturb: its options, its last parameters, and the moment to disturb it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.filesystem import local_copy
from pipelines import train
from pipelines.training import checkpoint
from pipelines.training.loop import Trainer

EPOCHS, STEPS = 3, 10
OPTIONS = {
    "method": "dah", "source": "typeset", "target": "handwritten", "bits": 16, "per_class": 4, "epochs": EPOCHS, "steps_per_epoch": STEPS,
    "tracking": "none", "plots": False, "workers": 2, "threads": 1,
}  # fmt: skip


def config(digits: Path, storage: Path, **more: Any) -> train.Config:
    """The options of the run, some of them changed."""
    return train.make_config({"dataset": str(digits), "storage": str(storage)} | OPTIONS | more)


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a finished run."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None and place.name == f"epoch-{EPOCHS:05d}"
    with local_copy(place) as copy:
        return load_file(copy / "model.safetensors")


@contextlib.contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, epoch: int = 1, step: int = 3) -> Iterator[None]:
    """A block in which trainings die after a step of an epoch (counted from 0), once what they have begun to write is written."""

    def due(self: Trainer, done: int) -> bool:
        if self.epoch == epoch and done == step:
            self.writing.result()
            raise KeyboardInterrupt
        return usual(self, done)

    usual = Trainer._due
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_due", due)
        with pytest.raises(KeyboardInterrupt):
            yield


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether parameters are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def wait_for_epoch(storage: Path, timeout: float = 120) -> Path:
    """Wait until a run has finished its first epoch and is within the next."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for progress in storage.glob("*/progress.jsonl"):
            if progress.read_text().count("\n") >= 1:
                time.sleep(0.15)
                return progress.parent
        time.sleep(0.02)
    raise AssertionError("no epoch was done in time")
