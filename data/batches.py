"""Batches of one domain for one worker.

The batches are a function of (manifest, seed, epoch, world size, rank) and never of timing. A worker owns a contiguous
range of rows; ingest shuffled all rows, so the range is a random sample. If the range fits into ``cache_mb`` it is kept in
memory as tensors; otherwise each epoch streams it through a shuffle buffer.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data.manifest import Manifest
from data.shards import read_rows, to_arrays
from data.transforms import random_view, seeded_generator

BUFFER_ROWS = 4096


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
    """Rows in memory: ``x`` (n, ...), ``label`` (n,) int64 or None, ``row`` (n,) int64."""

    x: Tensor
    label: Tensor | None
    row: Tensor

    def take(self, index: Tensor) -> "Rows":
        """Select rows by position."""
        return Rows(self.x[index], None if self.label is None else self.label[index], self.row[index])


def concatenate(parts: list[Rows]) -> Rows:
    """Concatenate rows."""
    label = None if parts[0].label is None else torch.cat([part.label for part in parts if part.label is not None])
    return Rows(torch.cat([part.x for part in parts]), label, torch.cat([part.row for part in parts]))


@dataclass
class DomainLoader:
    """Loads one worker's batches of one split.

    Attributes:
        batch: rows of a worker's batch; ignored if ``per_class`` is set.
        per_class: rows of each class in a worker's batch; 0 draws without regard to class.
        labels: whether to read the label column.
        views: augmented views per row.
        view: options of ``data.transforms.random_view``.
        cache_mb: memory in MiB up to which the worker's rows are kept in memory.
        stream: number that gives several loaders of one run different random draws.
        held: this worker's rows, if they are in memory already.
    """

    root: Path
    manifest: Manifest
    domain: str
    split: str
    batch: int
    per_class: int = 0
    labels: bool = True
    views: int = 0
    view: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0
    world: int = 1
    cache_mb: int = 1024
    stream: int = 0
    held: Rows | None = None

    def __post_init__(self) -> None:
        split = self.manifest.split(self.domain, self.split)
        self.start, self.stop = split.rows * self.rank // self.world, split.rows * (self.rank + 1) // self.world
        if self.stop == self.start:
            raise ValueError(f"{self.domain}/{self.split} has {split.rows} rows, too few for {self.world} workers")
        width = 4 * self.manifest.shape[0] if self.manifest.store == "feature" else int(np.prod(self.manifest.shape))
        self.cached = self.held is not None or (self.stop - self.start) * width <= self.cache_mb * 2**20
        self.present = [label for label, count in enumerate(split.labels) if count]

    def epoch(self, epoch: int, steps: int) -> Iterator[DomainBatch]:
        """Yield the batches of one epoch."""
        drawn = self._from_memory(epoch, steps) if self.cached else self._from_stream(epoch, steps)
        for step, rows in enumerate(drawn):
            generator = seeded_generator(self.seed, self.stream, 2, epoch, step)
            views = tuple(random_view(rows.x, generator, self.rank, self.world, **self.view) for _ in range(self.views))
            yield DomainBatch(rows.x, views, rows.label, rows.row)

    def _read(self, order: list[int] | None = None) -> Iterator[Rows]:
        batches = read_rows(
            self.root, self.manifest, self.domain, self.split, self.start, self.stop, labels=self.labels, order=order
        )
        for batch in batches:
            label = torch.from_numpy(batch.column("label").to_numpy().astype(np.int64)) if self.labels else None
            row = torch.from_numpy(batch.column("row").to_numpy().copy())
            yield Rows(torch.from_numpy(to_arrays(batch, self.manifest).copy()), label, row)

    @property
    def total(self) -> int:
        """Number of rows in the split, over all workers."""
        return self.manifest.split(self.domain, self.split).rows

    def rows(self, size: int = 512) -> Iterator[DomainBatch]:
        """Yield each of this worker's rows once, in stored (shuffled) order, ``size`` at a time, without views."""
        for rows in [self.cached_rows()] if self.cached else self._read():
            for part in torch.arange(len(rows.row)).split(size):
                taken = rows.take(part)
                yield DomainBatch(taken.x, (), taken.label, taken.row)

    def cached_rows(self) -> Rows:
        """This worker's rows, read once and kept."""
        if self.held is None:
            self.held = concatenate(list(self._read()))
        return self.held

    def _lacks(self, missing: list[int]) -> ValueError:
        names = ", ".join(self.manifest.classes[label] for label in missing[:5])
        return ValueError(
            f"worker {self.rank} of {self.world} has no row of class {names} in {self.domain}/{self.split}: use fewer workers"
        )

    def _from_memory(self, epoch: int, steps: int) -> Iterator[Rows]:
        rows = self.cached_rows()
        if self.per_class:
            assert rows.label is not None
            members = [torch.nonzero(rows.label == label).flatten() for label in self.present]
            missing = [label for label, each in zip(self.present, members, strict=True) if not len(each)]
            if missing:
                raise self._lacks(missing)
            draws = [_endless(each, seeded_generator(self.seed, self.stream, 1, epoch, self.rank, i), self.per_class) for i, each in enumerate(members)]
        else:
            draws = [_endless(torch.arange(len(rows.row)), seeded_generator(self.seed, self.stream, 1, epoch, self.rank), self.batch)]
        for _ in range(steps):
            yield rows.take(torch.cat([next(draw) for draw in draws]))

    def _from_stream(self, epoch: int, steps: int) -> Iterator[Rows]:
        generator = seeded_generator(self.seed, self.stream, 1, epoch, self.rank)
        drawn = self._balanced_stream(generator) if self.per_class else self._plain_stream(generator)
        for _, rows in zip(range(steps), drawn, strict=False):
            yield rows

    def _passes(self, generator: torch.Generator) -> Iterator[Rows]:
        """Read the worker's rows again and again, with a new file order in each pass."""
        files = len(self.manifest.split(self.domain, self.split).files)
        while True:
            yield from self._read(torch.randperm(files, generator=generator).tolist())

    def _plain_stream(self, generator: torch.Generator) -> Iterator[Rows]:
        """Draw each batch without replacement from a buffer that the stream refills."""
        passes, buffer = self._passes(generator), None
        while True:
            while buffer is None or len(buffer.row) < BUFFER_ROWS + self.batch:
                buffer = next(passes) if buffer is None else concatenate([buffer, next(passes)])
            order = torch.randperm(len(buffer.row), generator=generator)
            yield buffer.take(order[: self.batch])
            buffer = buffer.take(order[self.batch :])

    def _balanced_stream(self, generator: torch.Generator) -> Iterator[Rows]:
        """Draw from the most recent rows of each class; each step reads as many new rows as it draws."""
        size = max(self.per_class, BUFFER_ROWS // len(self.present))
        latest: dict[int, deque[Rows]] = {label: deque(maxlen=size) for label in self.present}
        arriving = self._single(generator)
        for _ in range(max(BUFFER_ROWS, self.stop - self.start)):
            self._keep(latest, next(arriving))
            if sum(map(len, latest.values())) >= min(BUFFER_ROWS, self.stop - self.start) and all(latest.values()):
                break
        missing = [label for label, kept in latest.items() if not kept]
        if missing:
            raise self._lacks(missing)
        while True:
            chosen = []
            for kept in latest.values():
                order = torch.randperm(max(len(kept), self.per_class), generator=generator)[: self.per_class]
                chosen += [kept[int(i) % len(kept)] for i in order]
            yield concatenate(chosen)
            for _ in range(len(chosen)):
                self._keep(latest, next(arriving))

    def _single(self, generator: torch.Generator) -> Iterator[Rows]:
        for rows in self._passes(generator):
            order = torch.randperm(len(rows.row), generator=generator)
            yield from (rows.take(order[i : i + 1]) for i in range(len(order)))

    @staticmethod
    def _keep(latest: dict[int, deque[Rows]], row: Rows) -> None:
        assert row.label is not None
        if int(row.label) >= 0:
            latest[int(row.label)].append(row)


def _endless(members: Tensor, generator: torch.Generator, batch: int) -> Iterator[Tensor]:
    """Yield batches from one shuffled pass after another; a batch may span two passes."""
    pool = members[:0]
    while True:
        while len(pool) < batch:
            pool = torch.cat([pool, members[torch.randperm(len(members), generator=generator)]])
        yield pool[:batch]
        pool = pool[batch:]
