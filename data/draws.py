"""Draws the rows of one worker's batches, from memory or from a stream.

The draws are functions of their arguments and never of timing. They use numpy where rows are selected: see ``StoredRows``.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.rows import AnyRows, StoredRows, concatenate
from data.transforms import seeded_generator

Passes = Callable[[torch.Generator], Iterator[StoredRows]]


@dataclass(frozen=True)
class Draws:
    """How a worker draws.

    Attributes:
        batch: rows of a batch; ignored if ``per_class`` is set.
        per_class: rows of each class in a batch; 0 draws without regard to class.
        classes: names of the classes that the split has rows of, by label.
        seeds: the run's seed and the number of its loader.
        rank: of the worker.
        place: of the rows, for messages.
    """

    batch: int
    per_class: int
    classes: dict[int, str]
    seeds: tuple[int, int]
    rank: int
    place: str

    def _generator(self, epoch: int, *more: int) -> torch.Generator:
        return seeded_generator(*self.seeds, 1, epoch, self.rank, *more)

    def _check_classes(self, missing: list[int]) -> None:
        if missing:
            names = ", ".join(self.classes[label] for label in missing[:5])
            raise ValueError(f"{self.place} has no row of class {names}: use fewer workers")

    def from_memory(self, rows: AnyRows, epoch: int) -> Iterator[AnyRows]:
        """Yield batches without end: pass after pass over the rows, or over those of each class, in a new order each time."""
        if self.per_class:
            members = [np.flatnonzero(np.asarray(rows.label) == label) for label in self.classes]
            self._check_classes([label for label, each in zip(self.classes, members, strict=True) if not len(each)])
            draws = [_endless(each, self._generator(epoch, i), self.per_class) for i, each in enumerate(members)]
        else:
            draws = [_endless(np.arange(len(rows.row)), self._generator(epoch), self.batch)]
        while True:
            yield rows.take(np.concatenate([next(draw) for draw in draws]))

    def from_stream(self, passes: Passes, rows: int, buffer: int, epoch: int) -> Iterator[StoredRows]:
        """Yield batches without end from a buffer that a stream refills.

        Args:
            passes: reads the worker's rows again and again, the order of files drawn by a generator.
            rows: of the worker.
            buffer: rows of the buffer.
        """
        generator = self._generator(epoch)
        return self._balanced(passes, generator, rows, buffer) if self.per_class else self._plain(passes(generator), generator, buffer)

    def _plain(self, arriving: Iterator[StoredRows], generator: torch.Generator, size: int) -> Iterator[StoredRows]:
        """Draw each batch without replacement from the buffer."""
        buffer = next(arriving)
        while True:
            while len(buffer.row) < size + self.batch:
                buffer = concatenate([buffer, next(arriving)])
            order = torch.randperm(len(buffer.row), generator=generator).numpy()
            yield buffer.take(order[: self.batch])
            buffer = buffer.take(order[self.batch :])

    def _balanced(self, passes: Passes, generator: torch.Generator, rows: int, buffer: int) -> Iterator[StoredRows]:
        """Draw from the most recent rows of each class; each step reads as many new rows as it draws."""
        size = max(self.per_class, buffer // len(self.classes))
        latest: dict[int, deque[StoredRows]] = {label: deque(maxlen=size) for label in self.classes}
        arriving = _single(passes(generator), generator)
        for _ in range(max(buffer, rows)):
            _keep(latest, next(arriving))
            if sum(map(len, latest.values())) >= min(buffer, rows) and all(latest.values()):
                break
        self._check_classes([label for label, kept in latest.items() if not kept])
        while True:
            chosen = []
            for kept in latest.values():
                order = torch.randperm(max(len(kept), self.per_class), generator=generator)[: self.per_class]
                chosen += [kept[int(i) % len(kept)] for i in order]
            yield concatenate(chosen)
            for _ in range(len(chosen)):
                _keep(latest, next(arriving))


def _single(arriving: Iterator[StoredRows], generator: torch.Generator) -> Iterator[StoredRows]:
    for rows in arriving:
        order = torch.randperm(len(rows.row), generator=generator).numpy()
        yield from (rows.take(order[i : i + 1]) for i in range(len(order)))


def _keep(latest: dict[int, deque[StoredRows]], row: StoredRows) -> None:
    assert row.label is not None
    if row.label[0] >= 0:
        latest[int(row.label[0])].append(row)


def _endless(members: np.ndarray, generator: torch.Generator, batch: int) -> Iterator[np.ndarray]:
    """Yield batches from one shuffled pass after another; a batch may span two passes."""
    pool = members[:0]
    while True:
        while len(pool) < batch:
            pool = np.concatenate([pool, members[torch.randperm(len(members), generator=generator).numpy()]])
        yield pool[:batch]
        pool = pool[batch:]
