"""Readers: what ingest takes, as a list of small chunks that any worker can read by itself.

A reader knows how many rows there are without reading them; ``read`` gives the rows of one chunk.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import digits
from data.images import SUFFIXES
from data.places import files, path_of

ARRAY_CHUNK, FILE_CHUNK = 8192, 512
MOST_CLASSES = 1_000_000
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200  # an array that unpacks to more than both is taken for a bomb


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


@dataclass(frozen=True)
class DigitsReader(Reader):
    """The embedded digits."""

    def chunks(self) -> list[Chunk]:
        return [Chunk(split, s, min(s + 500, n)) for split, n in self.counts.items() for s in range(0, n, 500)]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        images, labels = digits.read(self.domain, chunk.split, chunk.start, chunk.stop)
        for offset, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Row(f"{self.domain}/{chunk.split}/{chunk.start + offset}", int(label), image)


def digits_reader(domain: str) -> Reader:
    """Reader of ``typeset`` or ``handwritten``."""
    counts = digits.TYPESET if domain == "typeset" else digits.HANDWRITTEN
    classes = tuple(map(str, range(10)))
    return DigitsReader(domain, classes, (digits.SIZE, digits.SIZE), 1, dict(counts), {"name": "digits"})


@dataclass(frozen=True)
class NpzReader(Reader):
    """An ``.npz`` file: ``x_<split>``, ``y_<split>`` (optional), ``classes`` (optional)."""

    path: str = ""

    def read(self, chunk: Chunk) -> Iterator[Row]:
        with path_of(self.path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            rows = arrays[f"x_{chunk.split}"][chunk.start : chunk.stop]
            name = f"y_{chunk.split}"
            labels = arrays[name][chunk.start : chunk.stop] if name in arrays.files else np.full(len(rows), -1)
        for offset, (row, label) in enumerate(zip(rows, labels, strict=True)):
            yield Row(f"x_{chunk.split}/{chunk.start + offset}", int(label), row)


def npz_reader(path: Path, domain: str) -> Reader:
    """Open an ``.npz`` file and check what it holds.

    Raises:
        ValueError: it is no such file, or its arrays do not fit together.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _check_sizes(path, arrays)
            splits = [name[2:] for name in arrays.files if name.startswith("x_")]
            if not splits:
                raise ValueError(f"{path} has no x_<split> array: it has {', '.join(arrays.files) or 'none'}")
            counts, native, channels, classes = _check_arrays(path, arrays, splits)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no readable .npz file ({str(error)[:200]})") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is no readable .npz file of plain arrays ({error})") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return NpzReader(domain, classes, native, channels, counts, {"name": path.name, "sha256": digest}, str(path.resolve()))


def _check_sizes(path: Path, arrays: Any) -> None:
    """Refuse, before an array is read, what would fill the memory: headers that claim more than there is, and archives that unpack to far more.

    Raises:
        ValueError: there is such an array.
    """
    for each in arrays.zip.infolist():
        if each.file_size > BOMB_BYTES and each.file_size > BOMB_RATIO * max(each.compress_size, 1):
            raise ValueError(f"{path}: {each.filename[:80]!r} would unpack to {each.file_size:,} bytes from {each.compress_size:,}: pack it less tightly")
        with arrays.zip.open(each) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            claimed = math.prod(shape) * dtype.itemsize
            if claimed != each.file_size - file.tell():
                raise ValueError(f"{path}: {each.filename[:80]!r} claims {claimed:,} bytes and has {each.file_size - file.tell():,}")


def _check_arrays(path: Path, arrays: Any, splits: list[str]) -> tuple[dict[str, int], tuple[int, ...], int, tuple[str, ...]]:
    counts, shapes, top = {}, set(), -1
    for split in splits:
        x, labels = arrays[f"x_{split}"], arrays[f"y_{split}"] if f"y_{split}" in arrays.files else None
        images = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and 3 in (x.shape[1], x.shape[3])))
        if not images and not (x.ndim == 2 and np.issubdtype(x.dtype, np.floating)):
            raise ValueError(f"{path}: x_{split} is {x.dtype} {list(x.shape)}, neither uint8 images nor (n, features) floats")
        if not len(x):
            raise ValueError(f"{path}: x_{split} is empty")
        if labels is not None and (labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"{path}: y_{split} is {labels.dtype} {list(labels.shape)}, not {len(x)} integers")
        if labels is not None and not -1 <= labels.min() <= labels.max() < MOST_CLASSES:
            raise ValueError(f"{path}: y_{split} has labels from {labels.min()} to {labels.max()}, but they are class indices from 0, or -1 for none")
        top = max(top, int(labels.max()) if labels is not None else -1)
        counts[split] = len(x)
        shapes.add(x.shape[1:])
    if len(shapes) > 1:
        raise ValueError(f"{path}: its splits have different shapes: {', '.join(map(str, shapes))}")
    shape = shapes.pop()
    if len(shape) == 1:
        native, channels = shape, 0
    else:
        channels = 1 if len(shape) == 2 else 3
        native = shape if len(shape) == 2 else shape[:2] if shape[2] == 3 else shape[1:]
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays.files else tuple(map(str, range(top + 1)))
    if top >= len(classes):
        raise ValueError(f"{path}: label {top}, but only {len(classes)} class names")
    return counts, native, channels, classes


@dataclass(frozen=True)
class FolderReader(Reader):
    """A folder ``<class>/<file>``, or of files without labels; a chunk is a range of one class's sorted files."""

    path: str = ""
    files: tuple[int, ...] = ()

    def chunks(self) -> list[Chunk]:
        return [
            Chunk("train", start, min(start + FILE_CHUNK, count), label if self.classes else -1)
            for label, count in enumerate(self.files)
            for start in range(0, count, FILE_CHUNK)
        ]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        root = path_of(self.path)
        folder = root / self.classes[chunk.label] if self.classes else root
        for path in image_files(folder)[chunk.start : chunk.stop]:
            yield Row(printable(path.relative_to(root).as_posix()), chunk.label, path.read_bytes())


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; hidden ones are none."""
    return [path for path in files(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]


def printable(name: str) -> str:
    """A file's name as text to keep and to show: what is no character of UTF-8, or would steer a terminal, is replaced."""
    text = name.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def folder_readers(path: Path, domain: str | None, classes: int | None = None) -> list[Reader]:
    """Readers of a folder ``<class>/<file>`` (``domain`` names it), ``<domain>/<class>/<file>`` (``domain`` picks one) or ``<file>`` (no labels).

    Args:
        classes: the known number of classes, where the folder is a known dataset.

    Raises:
        ValueError: nothing to read, a class without images, or a class count that is not the known one.
    """
    folders = _folders(path)
    if not folders and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: expected <class>/<file>, <domain>/<class>/<file>, or images without labels")
    if not folders:
        return [_folder_reader(path, domain or path.name, classes)]
    nested = all(_folders(each) and not any(p.suffix.lower() in SUFFIXES for p in each.iterdir()) for each in folders)
    if not nested:
        return [_folder_reader(path, domain or path.name, classes)]
    if domain and domain not in {each.name for each in folders}:
        raise ValueError(f"{path} has no domain folder {domain!r}: it has {', '.join(each.name for each in folders)}")
    return [_folder_reader(each, each.name, classes) for each in folders if domain in (None, each.name)]


def _folder_reader(path: Path, domain: str, classes: int | None) -> Reader:
    folders = _folders(path)
    parts = folders or [path]
    counts = tuple(len(image_files(part)) for part in parts)
    empty = [part.name for part, count in zip(parts, counts, strict=True) if not count]
    if not sum(counts):
        raise ValueError(f"{path} holds no image file ({', '.join(sorted(SUFFIXES))})")
    if empty:
        raise ValueError(f"{path}: no image in class {', '.join(empty[:5])}: remove the folder or add images")
    if classes is not None and len(folders) != classes:
        raise ValueError(f"{path} has {len(folders)} class folders, but this dataset has {classes}: is the copy whole?")
    names = tuple(folder.name for folder in folders)
    return FolderReader(domain, names, (), 0, {"train": sum(counts)}, {"name": path.name}, str(path.resolve()), counts)


@dataclass(frozen=True)
class TorchvisionReader(Reader):
    """A torchvision dataset that keeps its images in memory, downloaded once to ``path``."""

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
    """Download a torchvision dataset where it is not there yet, and open it.

    Raises:
        ValueError: it cannot be downloaded; says what to do.
    """
    counts = {}
    for split in ("train", "test"):
        try:
            present = _present(name, path, split)
            dataset = present if present is not None else _torchvision(name, str(path), split, download=True)
        except Exception as error:  # network errors come in many types, and all mean one thing to the user
            raise ValueError(
                f"{name} cannot be downloaded to {path} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
                "put its files there by hand, or ingest an .npz file or a folder"
            ) from error
        counts[split] = len(dataset)
        classes = classes or tuple(str(each) for each in dataset.classes)
    native = (size, size) if size else ()
    return TorchvisionReader(name, classes, native, channels, counts, {"name": name}, name, str(path))


def _present(name: str, path: Path, split: str) -> Any:
    try:
        return _torchvision(name, str(path), split, download=False)
    except (RuntimeError, OSError):
        return None
