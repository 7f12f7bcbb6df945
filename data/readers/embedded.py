"""Reader of the embedded digits (``data.digits``)."""

from collections.abc import Iterator
from dataclasses import dataclass

from data import digits
from data.readers.base import Chunk, Reader, Row


@dataclass(frozen=True)
class DigitsReader(Reader):
    """Reads the embedded digits."""

    def chunks(self) -> list[Chunk]:
        return [Chunk(split, s, min(s + 500, n)) for split, n in self.counts.items() for s in range(0, n, 500)]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        images, labels = digits.read(self.domain, chunk.split, chunk.start, chunk.stop)
        for offset, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Row(f"{self.domain}/{chunk.split}/{chunk.start + offset}", int(label), image)


def digits_reader(domain: str) -> Reader:
    """Open domain ``typeset`` or ``handwritten``."""
    counts = digits.TYPESET if domain == "typeset" else digits.HANDWRITTEN
    classes = tuple(map(str, range(10)))
    return DigitsReader(domain, classes, (digits.SIZE, digits.SIZE), 1, dict(counts), {"name": "digits"})
