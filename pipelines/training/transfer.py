"""Copies batches to the training device; to a GPU ahead of their use, beside the training."""

from collections.abc import Iterable, Iterator

import torch

from data.rows import DomainBatch
from models.clock import part

Pair = tuple[DomainBatch | None, ...]


def on_device(batches: Iterable[Pair], device: torch.device) -> Iterator[Pair]:
    """Copy batches to a device: to a GPU one batch ahead of its use, on a stream of its own."""
    if device.type != "cuda":
        for pair in batches:
            with part("transfer"):
                moved_pair = tuple(rows and rows.to(device) for rows in pair)
            yield moved_pair
        return
    copying, before = torch.cuda.Stream(device), None
    for pair in batches:
        with part("transfer"), torch.cuda.stream(copying):
            moved = tuple(rows and rows.to(device) for rows in pair), copying.record_event()
        if before:
            yield _arrived(*before)
        before = moved
    if before:
        yield _arrived(*before)


def _arrived(pair: Pair, copied: torch.cuda.Event) -> Pair:
    """Batches whose copy the current stream waits for, and whose memory stays theirs until it has used them."""
    here = torch.cuda.current_stream()
    here.wait_event(copied)
    for rows in pair:
        for tensor in (rows.x, rows.label, rows.row) if rows else ():
            if tensor is not None:
                tensor.record_stream(here)
    return pair
