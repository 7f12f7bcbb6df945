"""The interface of a reader: a source split into small chunks that any worker can read on its own.

A reader knows the number of rows without reading them; ``read`` yields the rows of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ARRAY_CHUNK, FILE_CHUNK = 8192, 512


class Row(NamedTuple):
    """One row as read: file bytes, an image array (h, w[, 3]) uint8, or a feature vector; label -1 if unknown."""

    id: str
    label: int
    content: bytes | np.ndarray


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of a split (of a folder's class, where ``label`` says which)."""

    split: str
    start: int
    stop: int
    label: int = -1


@dataclass(frozen=True)
class Reader:
    """Base of the readers.

    Attributes:
        domain: name of the domain.
        classes: class names in label order; empty where nothing is known of them.
        native: (height, width) of equal images, (features,) of vectors, () of files of any size.
        channels: 1, 3, or 0 where it varies.
        counts: rows of each split.
    """

    domain: str
    classes: tuple[str, ...]
    native: tuple[int, ...]
    channels: int
    counts: dict[str, int]
    origin: dict[str, str] = field(default_factory=dict)

    def chunks(self) -> list[Chunk]:
        """The chunks that make up the domain."""
        return [
            Chunk(split, start, min(start + ARRAY_CHUNK, count))
            for split, count in self.counts.items()
            for start in range(0, count, ARRAY_CHUNK)
        ]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        """The rows of a chunk."""
        raise NotImplementedError


def printable(name: str) -> str:
    """A file's name as text to keep and to show: what is no character of UTF-8, or would steer a terminal, is replaced."""
    text = name.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(each if each.isprintable() else "\ufffd" for each in text)
