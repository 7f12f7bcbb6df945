"""Batches of one domain for one worker.

The batches are a function of (manifest, seed, epoch, world size, rank) and never of timing or the number of decoding threads.
A worker owns a contiguous range of rows; ingest shuffled all rows, so the range is a random sample. If the range fits into
``cache_mb`` it is kept in memory, decoded or else as it is stored, and both draw the same batches; otherwise each epoch streams
it, as it is stored, through a shuffle buffer. Images are decoded after they are drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.decoding import AHEAD, Decoder, batch_rows, stored_content
from data.draws import Draws
from data.manifest import Manifest
from data.rows import DomainBatch, Rows, StoredRows, concatenate
from data.shards import read_rows
from data.transforms import random_view, seeded_generator

BUFFER_ROWS, BUFFER_MB = 4096, 256  # rows of the shuffle buffer at most; its bytes at most, if ``cache_mb`` is less


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
        held: this worker's rows, if they are in memory already; with their embedded views, if there are any.
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
        present = {label: self.manifest.classes[label] for label, count in enumerate(split.labels) if count}
        place = f"worker {self.rank} of {self.world}"
        self.pool = self.manifest.views if self.views else 0  # embedded views that each row is read with
        self.draws = Draws(self.batch, self.per_class, present, (self.seed, self.stream), self.rank, f"{self.domain}/{self.split} on {place}")
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
        rows, size = self.stop - self.start, self.per_class * len(self.draws.classes) or self.batch
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
        drawn = islice(self._drawn(epoch), first, steps)
        if self.cached:
            for rows in drawn:
                yield self._batch(rows.x.pin_memory() if self.pinned else rows.x, rows.label, rows.row)
        else:
            for rows, x in self.decoder.ahead(drawn, lambda rows: (rows.content, rows.row)):
                batch = rows.batch(x)
                yield self._batch(batch.x, batch.label, batch.row)

    def _batch(self, x: torch.Tensor, label: torch.Tensor | None, row: torch.Tensor) -> DomainBatch:
        """A batch of decoded rows; of rows with embedded views its only view is all of these, (batch, views, features), if views are wanted."""
        width = self.manifest.shape[0]
        if not self.manifest.views or x.shape[1] == width:
            return DomainBatch(x, (), label, row)
        pool = (x[:, width:].reshape(len(x), -1, width),) if self.pool else ()
        return DomainBatch(x[:, :width].contiguous(), pool, label, row)

    def with_views(self, batch: DomainBatch, epoch: int, step: int) -> DomainBatch:
        """Add the augmented views of a step, made or, of embedded views and the row itself, chosen, where the batch lies; drawn for the global batch."""
        generator = seeded_generator(self.seed, self.stream, 2, epoch, step)
        if self.pool:
            pool, n = torch.cat([batch.x.unsqueeze(1), *batch.views], 1), len(batch.x)
            draws = [torch.randint(1 + self.pool, (n * self.world,), generator=generator) for _ in range(self.views)]
            chosen = [each[self.rank * n : (self.rank + 1) * n] for each in draws]
            return batch._replace(views=tuple(pool[torch.arange(n, device=pool.device), each.to(pool.device)] for each in chosen))
        return batch._replace(views=tuple(random_view(batch.x, generator, self.rank, self.world, **self.view) for _ in range(self.views)))

    def _read(self, order: list[int] | None = None) -> Iterator[StoredRows]:
        batches = read_rows(
            self.root, self.manifest, self.domain, self.split, self.start, self.stop, labels=self.labels, views=bool(self.pool), order=order
        )
        for batch in batches:
            label = batch.column("label").to_numpy().astype(np.int64) if self.labels else None
            yield StoredRows(stored_content(batch, self.manifest), label, batch.column("row").to_numpy().copy())

    @property
    def total(self) -> int:
        """Number of rows in the split, over all workers."""
        return self.manifest.split(self.domain, self.split).rows

    def rows(self) -> Iterator[DomainBatch]:
        """Yield each of this worker's rows once, in stored (shuffled) order, in batches of at most ``batch_rows``; with the embedded views of ``_batch``."""
        size = batch_rows(tuple(self.manifest.shape))
        if self.cached:
            for part in _slices(self.stop - self.start, size):
                taken = self.cached_rows().take(part)
                yield self._batch(taken.x, taken.label, taken.row)
            return
        parts = (rows.take(part) for rows in self._read() for part in _slices(len(rows.row), size))
        for rows, x in self.decoder.ahead(parts, lambda rows: (rows.content, rows.row)):
            batch = rows.batch(x)
            yield self._batch(batch.x, batch.label, batch.row)

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

    def _drawn(self, epoch: int) -> Iterator[Any]:
        """The rows of each step, without end: decoded if they are held so, otherwise as they are stored."""
        if self.cached:
            return self.draws.from_memory(self.cached_rows(), epoch)
        if self._fits(self._stored_bytes):
            return self.draws.from_memory(self._stored_rows, epoch)
        return self.draws.from_stream(self._passes, self.stop - self.start, self._buffer, epoch)

    def _passes(self, generator: torch.Generator) -> Iterator[StoredRows]:
        """Read the worker's rows again and again, with a new file order in each pass."""
        files = len(self.manifest.split(self.domain, self.split).files)
        while True:
            yield from self._read(torch.randperm(files, generator=generator).tolist())


def _slices(rows: int, size: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + size, rows)) for start in range(0, rows, size))
