"""Rows of one domain in memory, and the batches that methods get."""

from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor


class DomainBatch(NamedTuple):
    """One worker's part of a global batch, of one domain.

    Attributes:
        x: (batch, channels, h, w) uint8, or (batch, features) float32.
        views: augmented copies of ``x``, float32 in its range.
        label: (batch,) int64, or None if labels are not read.
        row: (batch,) int64.
    """

    x: Tensor
    views: tuple[Tensor, ...]
    label: Tensor | None
    row: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy the batch to a device."""
        label = None if self.label is None else self.label.to(device, non_blocking=True)
        views = tuple(view.to(device, non_blocking=True) for view in self.views)
        return type(self)(self.x.to(device, non_blocking=True), views, label, self.row.to(device, non_blocking=True))


class Rows(NamedTuple):
    """Decoded rows in memory: ``x`` (n, ...), ``label`` (n,) int64 or None, ``row`` (n,) int64."""

    x: Tensor
    label: Tensor | None
    row: Tensor

    def take(self, index: np.ndarray) -> "Rows":
        """Select rows by position."""
        chosen = torch.from_numpy(index)
        return Rows(self.x[chosen], None if self.label is None else self.label[chosen], self.row[chosen])


class StoredRows(NamedTuple):
    """Rows as they are stored: ``content`` (n,) bytes objects or (n, features) float32, ``label`` (n,) int64 or None, ``row`` (n,) int64.

    All are numpy arrays: they are drawn in another thread, and an operation of torch there that starts OpenMP threads, as indexing does,
    makes each small operation of the training thread three times as slow from then on.
    """

    content: np.ndarray
    label: np.ndarray | None
    row: np.ndarray

    def take(self, index: np.ndarray) -> "StoredRows":
        """Select rows by position; the bytes are not copied."""
        return StoredRows(self.content[index], None if self.label is None else self.label[index], self.row[index])

    def batch(self, x: Tensor) -> DomainBatch:
        """The batch of these rows, of which ``x`` was decoded."""
        return DomainBatch(x, (), None if self.label is None else torch.from_numpy(self.label), torch.from_numpy(self.row))


AnyRows = TypeVar("AnyRows", Rows, StoredRows)


def concatenate(parts: list[StoredRows]) -> StoredRows:
    """Concatenate rows."""
    label = None if parts[0].label is None else np.concatenate([part.label for part in parts if part.label is not None])
    return StoredRows(np.concatenate([part.content for part in parts]), label, np.concatenate([part.row for part in parts]))
