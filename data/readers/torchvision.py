"""Reader of datasets that torchvision downloads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.readers.base import Chunk, Reader, Row


@dataclass(frozen=True)
class TorchvisionReader(Reader):
    """Reads a torchvision dataset, downloaded once to ``path``."""

    name: str = ""
    path: str = ""

    def read(self, chunk: Chunk) -> Iterator[Row]:
        dataset = _torchvision(self.name, self.path, chunk.split, download=False)
        for index in range(chunk.start, chunk.stop):
            image, label = dataset[index]
            yield Row(f"{self.name}/{chunk.split}/{index}", int(label), np.asarray(image))


def _torchvision(name: str, path: str, split: str, download: bool) -> Any:
    from torchvision import datasets  # noqa: PLC0415

    if name == "svhn":
        return datasets.SVHN(path, split=split, download=download)
    if name == "places365":
        return datasets.Places365(path, split={"train": "train-standard", "test": "val"}[split], small=True, download=download)
    return {"mnist": datasets.MNIST, "usps": datasets.USPS, "cifar10": datasets.CIFAR10}[name](
        path, train=split == "train", download=download
    )


def torchvision_reader(name: str, path: Path, classes: tuple[str, ...], size: int, channels: int) -> Reader:
    """Open a torchvision dataset; downloads it if it is not there.

    Raises:
        ValueError: it cannot be downloaded; says what to do.
    """
    counts = {}
    for split in ("train", "test"):
        try:
            present = _present(name, path, split)
            dataset = present if present is not None else _torchvision(name, str(path), split, download=True)
        except Exception as error:  # network errors have many types, and all mean the same to the user
            raise ValueError(
                f"{name} cannot be downloaded to {path} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
                "put its files there by hand, or ingest an .npz file or a folder"
            ) from error
        counts[split] = len(dataset)
        classes = classes or tuple(str(each) for each in dataset.classes)
    native = (size, size) if size else ()
    return TorchvisionReader(name, classes, native, channels, counts, {"name": name}, name=name, path=str(path))


def _present(name: str, path: Path, split: str) -> Any:
    try:
        return _torchvision(name, str(path), split, download=False)
    except (RuntimeError, OSError):
        return None
