"""A trained encoder by what the user calls it, and the rows that it takes."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from models.encoder import HashEncoder
from pipelines import runs
from pipelines.evaluate import load_method


class Encoder(Protocol):
    """Rows as stored -> packed codes, with the shape of a row and the code length."""

    shape: tuple[int, ...]
    bits: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) to (n, bits / 8) uint8."""


class RunEncoder:
    """The encoder of a run's last checkpoint."""

    def __init__(self, folder: Path) -> None:
        method = load_method(folder)
        self.encoder, self.shape, self.bits = HashEncoder(method.encoder()).eval(), method.shape, method.bits

    @torch.no_grad()
    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.encoder(torch.from_numpy(rows)).numpy()


def registry(model: str, storage: str, tracking: str) -> str:
    """The tracking URI of a registered model's registry; "" for a run, which needs none."""
    if not model.startswith("models:/"):
        return ""
    from pipelines.tracking import default_uri  # noqa: PLC0415  mlflow is slow to import

    return tracking or default_uri(storage)


def open_encoder(model: str, storage: str, tracking: str) -> Encoder:
    """The encoder of ``models:/NAME@ALIAS`` (or ``/VERSION``), or of a run's id.

    Raises:
        ValueError: there is none.
    """
    if model.startswith("models:/"):
        from pipelines.tracking import RegisteredEncoder  # noqa: PLC0415  mlflow is slow to import

        return RegisteredEncoder(model, registry(model, storage, tracking))
    return RunEncoder(runs.find_run(model, storage))
