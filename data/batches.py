"""Batches of one domain for one worker.

The batches are a function of (manifest, seed, epoch, world size, rank) and never of timing or the number of decoding threads.
A worker owns a contiguous range of rows; ingest shuffled all rows, so the range is a random sample. If the range fits into
``cache_mb`` it is kept in memory, decoded or else as it is stored, and both draw the same batches; otherwise each epoch streams
it, as it is stored, through a shuffle buffer. Images are decoded after they are drawn.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.decoding import AHEAD, Decoder, batch_rows, stored_content
from data.manifest import Manifest
from data.shards import read_rows
from data.transforms import random_view, seeded_generator

BUFFER_ROWS, BUFFER_MB = 4096, 256  # rows of the shuffle buffer at most; its bytes at most, if ``cache_mb`` is less


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

    def take(self, index: Tensor) -> "Rows":
        """Select rows by position."""
        return Rows(self.x[index], None if self.label is None else self.label[index], self.row[index])


class StoredRows(NamedTuple):
    """Rows as they are stored: ``content`` (n,) bytes objects or (n, features) float32, ``label`` (n,) int64 or None, ``row`` (n,) int64.

    All are numpy arrays: they are drawn in another thread, and an operation of torch there that starts OpenMP threads, as indexing does,
    makes each small operation of the training thread three times as slow from then on.
    """

    content: np.ndarray
    label: np.ndarray | None
    row: np.ndarray

    def take(self, index: Tensor) -> "StoredRows":
        """Select rows by position; the bytes are not copied."""
        chosen = index.numpy()
        return StoredRows(self.content[chosen], None if self.label is None else self.label[chosen], self.row[chosen])

    def batch(self, x: Tensor) -> DomainBatch:
        """The batch of these rows, of which ``x`` was decoded."""
        return DomainBatch(x, (), None if self.label is None else torch.from_numpy(self.label), torch.from_numpy(self.row))


AnyRows = TypeVar("AnyRows", Rows, StoredRows)


def concatenate(parts: list[StoredRows]) -> StoredRows:
    """Concatenate rows."""
    label = None if parts[0].label is None else np.concatenate([part.label for part in parts if part.label is not None])
    return StoredRows(np.concatenate([part.content for part in parts]), label, np.concatenate([part.row for part in parts]))


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
        decoders: decoding threads; 0 for the calling thread, None for one a core.
        pinned: whether batches lie in page-locked memory, for a GPU.
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
    decoders: int | None = None
    pinned: bool = False

    def __post_init__(self) -> None:
        split = self.manifest.split(self.domain, self.split)
        self.start, self.stop = split.rows * self.rank // self.world, split.rows * (self.rank + 1) // self.world
        if self.stop == self.start:
            raise ValueError(f"{self.domain}/{self.split} has {split.rows} rows, too few for {self.world} workers")
        self.cached = self.held is not None or self._fits(self.manifest.row_bytes)
        self.present = [label for label, count in enumerate(split.labels) if count]
        self.decoder = Decoder(self.manifest, self.decoders, self.pinned)

    def _fits(self, width: float) -> bool:
        """Whether this worker's rows of ``width`` bytes may be kept in memory."""
        return (self.stop - self.start) * width <= self.cache_mb * 2**20

    @cached_property
    def _stored_bytes(self) -> float:
        """Mean bytes of a row as it is stored."""
        if not self.manifest.compressed:
            return self.manifest.row_bytes
        split = self.manifest.split(self.domain, self.split)
        return sum((self.root / file["path"]).stat().st_size for file in split.files) / split.rows

    @cached_property
    def _buffer(self) -> int:
        """Rows of the shuffle buffer."""
        return int(max(1, min(BUFFER_ROWS, max(self.cache_mb, BUFFER_MB) * 2**20 / self._stored_bytes)))

    @property
    def memory(self) -> str:
        """Where the rows are and how much memory they take, with the batches that are decoded ahead."""
        rows, size = self.stop - self.start, self.per_class * len(self.present) or self.batch
        ahead = (AHEAD + 1) * size * self.manifest.row_bytes if self.decoder.threads and not self.cached else 0
        if self.cached:
            what, held = f"{rows:,} rows in memory", rows * self.manifest.row_bytes
        elif self._fits(self._stored_bytes):
            what, held = f"{rows:,} rows in memory as they are stored", int(rows * self._stored_bytes)
        else:
            what, held = f"{rows:,} rows streamed through a buffer of {self._buffer:,}", int(self._buffer * self._stored_bytes)
        threads = f", {self.decoder.threads} decoders" if self.decoder.threads and not self.cached else ""
        return f"{self.domain}: {what}, {(held + ahead) / 2**20:,.0f} MiB{threads}"

    def epoch(self, epoch: int, steps: int, first: int = 0) -> Iterator[DomainBatch]:
        """Yield the batches of one epoch from step ``first`` on, without views. Skipped steps are drawn, but not decoded."""
        drawn = islice(self._drawn(epoch, steps), first, None)
        if self.cached:
            for rows in drawn:
                x = rows.x.pin_memory() if self.pinned else rows.x
                yield DomainBatch(x, (), rows.label, rows.row)
        else:
            for rows, x in self.decoder.ahead(drawn, lambda rows: (rows.content, rows.row)):
                yield rows.batch(x)

    def with_views(self, batch: DomainBatch, epoch: int, step: int) -> DomainBatch:
        """Add the augmented views of a step, made where the batch lies. The draws are those of the global batch."""
        generator = seeded_generator(self.seed, self.stream, 2, epoch, step)
        return batch._replace(views=tuple(random_view(batch.x, generator, self.rank, self.world, **self.view) for _ in range(self.views)))

    def _read(self, order: list[int] | None = None) -> Iterator[StoredRows]:
        batches = read_rows(
            self.root, self.manifest, self.domain, self.split, self.start, self.stop, labels=self.labels, order=order
        )
        for batch in batches:
            label = batch.column("label").to_numpy().astype(np.int64) if self.labels else None
            yield StoredRows(stored_content(batch, self.manifest), label, batch.column("row").to_numpy().copy())

    @property
    def total(self) -> int:
        """Number of rows in the split, over all workers."""
        return self.manifest.split(self.domain, self.split).rows

    def rows(self, size: int = 0) -> Iterator[DomainBatch]:
        """Yield each of this worker's rows once, in stored (shuffled) order, without views.

        Args:
            size: rows of a batch at most; by default as many as an encoder takes at once.
        """
        size = size or batch_rows(tuple(self.manifest.shape))
        if self.cached:
            for part in torch.arange(self.stop - self.start).split(size):
                taken = self.cached_rows().take(part)
                yield DomainBatch(taken.x, (), taken.label, taken.row)
            return
        parts = (rows.take(part) for rows in self._read() for part in torch.arange(len(rows.row)).split(size))
        for rows, x in self.decoder.ahead(parts, lambda rows: (rows.content, rows.row)):
            yield rows.batch(x)

    def cached_rows(self) -> Rows:
        """This worker's rows, decoded once and kept."""
        if self.held is None:
            parts = [rows.batch(x) for rows, x in self.decoder.ahead(self._read(), lambda rows: (rows.content, rows.row))]
            label = torch.cat([part.label for part in parts if part.label is not None]) if self.labels else None
            self.held = Rows(torch.cat([part.x for part in parts]), label, torch.cat([part.row for part in parts]))
        return self.held

    @cached_property
    def _stored_rows(self) -> StoredRows:
        """This worker's rows as they are stored, read once and kept."""
        return concatenate(list(self._read()))

    def _drawn(self, epoch: int, steps: int) -> Iterator[Any]:
        """The rows of each step: decoded if they are held so, otherwise as they are stored."""
        if self.cached:
            return self._from_memory(self.cached_rows(), epoch, steps)
        return self._from_memory(self._stored_rows, epoch, steps) if self._fits(self._stored_bytes) else self._from_stream(epoch, steps)

    def _lacks(self, missing: list[int]) -> ValueError:
        names = ", ".join(self.manifest.classes[label] for label in missing[:5])
        return ValueError(
            f"worker {self.rank} of {self.world} has no row of class {names} in {self.domain}/{self.split}: use fewer workers"
        )

    def _from_memory(self, rows: AnyRows, epoch: int, steps: int) -> Iterator[AnyRows]:
        if self.per_class:
            assert rows.label is not None
            members = [torch.from_numpy(np.flatnonzero(np.asarray(rows.label) == label)) for label in self.present]
            missing = [label for label, each in zip(self.present, members, strict=True) if not len(each)]
            if missing:
                raise self._lacks(missing)
            draws = [_endless(each, seeded_generator(self.seed, self.stream, 1, epoch, self.rank, i), self.per_class) for i, each in enumerate(members)]
        else:
            draws = [_endless(torch.arange(len(rows.row)), seeded_generator(self.seed, self.stream, 1, epoch, self.rank), self.batch)]
        for _ in range(steps):
            yield rows.take(torch.cat([next(draw) for draw in draws]))

    def _from_stream(self, epoch: int, steps: int) -> Iterator[StoredRows]:
        generator = seeded_generator(self.seed, self.stream, 1, epoch, self.rank)
        drawn = self._balanced_stream(generator) if self.per_class else self._plain_stream(generator)
        for _, rows in zip(range(steps), drawn, strict=False):
            yield rows

    def _passes(self, generator: torch.Generator) -> Iterator[StoredRows]:
        """Read the worker's rows again and again, with a new file order in each pass."""
        files = len(self.manifest.split(self.domain, self.split).files)
        while True:
            yield from self._read(torch.randperm(files, generator=generator).tolist())

    def _plain_stream(self, generator: torch.Generator) -> Iterator[StoredRows]:
        """Draw each batch without replacement from a buffer that the stream refills."""
        passes, buffer = self._passes(generator), None
        while True:
            while buffer is None or len(buffer.row) < self._buffer + self.batch:
                buffer = next(passes) if buffer is None else concatenate([buffer, next(passes)])
            order = torch.randperm(len(buffer.row), generator=generator)
            yield buffer.take(order[: self.batch])
            buffer = buffer.take(order[self.batch :])

    def _balanced_stream(self, generator: torch.Generator) -> Iterator[StoredRows]:
        """Draw from the most recent rows of each class; each step reads as many new rows as it draws."""
        size = max(self.per_class, self._buffer // len(self.present))
        latest: dict[int, deque[StoredRows]] = {label: deque(maxlen=size) for label in self.present}
        arriving = self._single(generator)
        for _ in range(max(self._buffer, self.stop - self.start)):
            self._keep(latest, next(arriving))
            if sum(map(len, latest.values())) >= min(self._buffer, self.stop - self.start) and all(latest.values()):
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

    def _single(self, generator: torch.Generator) -> Iterator[StoredRows]:
        for rows in self._passes(generator):
            order = torch.randperm(len(rows.row), generator=generator)
            yield from (rows.take(order[i : i + 1]) for i in range(len(order)))

    @staticmethod
    def _keep(latest: dict[int, deque[StoredRows]], row: StoredRows) -> None:
        assert row.label is not None
        if row.label[0] >= 0:
            latest[int(row.label[0])].append(row)


def _endless(members: Tensor, generator: torch.Generator, batch: int) -> Iterator[Tensor]:
    """Yield batches from one shuffled pass after another; a batch may span two passes."""
    pool = members[:0]
    while True:
        while len(pool) < batch:
            pool = torch.cat([pool, members[torch.randperm(len(members), generator=generator)]])
        yield pool[:batch]
        pool = pool[batch:]
