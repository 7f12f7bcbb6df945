"""Copies batches to the training device and results back; to and from a GPU beside its work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from data.rows import DomainBatch
from models.clock import part

Pair = tuple[DomainBatch | None, ...]
Item = TypeVar("Item")


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


def from_device(results: Iterable[tuple[Item, dict[str, Tensor]]], device: torch.device) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Copy what is computed of batches to the CPU; what a GPU has computed is waited for when it has its next batch to work on."""
    if device.type != "cuda":
        yield from results
        return
    before = None
    for item, computed in results:
        copied = {name: values.to("cpu", non_blocking=True) for name, values in computed.items()}  # into page-locked memory
        now = item, copied, torch.cuda.current_stream(device).record_event()
        if before:
            yield _finished(*before)
        before = now
    if before:
        yield _finished(*before)


def _finished(item: Item, copied: dict[str, Tensor], done: torch.cuda.Event) -> tuple[Item, dict[str, Tensor]]:
    """A batch with its results, which are there."""
    done.synchronize()
    return item, copied
