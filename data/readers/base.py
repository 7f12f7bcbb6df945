"""The interface of a reader: a source split into small chunks that any worker can read on its own.

A reader knows the number of rows without reading them; ``read`` yields the rows of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np

ARRAY_CHUNK, FILE_CHUNK = 8192, 512


class Row(NamedTuple):
    """One row as read: file bytes, an image array (h, w[, 3]) uint8, or a feature vector.

    ``label`` is -1 if unknown; ``error`` says why the row could not be read.
    """

    id: str
    label: int
    content: bytes | np.ndarray
    error: str = ""


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of a split, or of one class of it if ``label`` is set; the names of their files, if they are files."""

    split: str
    start: int
    stop: int
    label: int = -1
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Base class of the readers.

    Attributes:
        domain: name of the domain.
        classes: class names in label order; empty if unknown.
        native: (height, width) if all images have one size, (features,) for vectors, () for files of any size.
        channels: 1, 3, or 0 if it varies.
        counts: rows of each split.
        origin: where the rows come from, for the manifest.
        notes: what the user must know, such as files that are left out.
    """

    domain: str
    classes: tuple[str, ...]
    native: tuple[int, ...]
    channels: int
    counts: dict[str, int]
    origin: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def chunks(self) -> list[Chunk]:
        """The chunks that make up the domain."""
        return [
            Chunk(split, start, min(start + ARRAY_CHUNK, count))
            for split, count in self.counts.items()
            for start in range(0, count, ARRAY_CHUNK)
        ]

    def class_counts(self) -> dict[str, int]:
        """Rows of each class.

        Raises:
            ValueError: they are not known before all rows are read.
        """
        raise ValueError(f"{self.domain}: --classes with a number needs a folder or an image list; give names instead")

    def without_listing(self) -> Self:
        """The reader without what only ``chunks`` needs: what a worker receives."""
        return self

    def read(self, chunk: Chunk) -> Iterator[Row]:
        """Yield the rows of a chunk."""
        raise NotImplementedError


def printable(name: str) -> str:
    """A file name that is safe to store and print: invalid UTF-8 and control characters are replaced."""
    text = name.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(each if each.isprintable() else "\ufffd" for each in text)
