"""Reader of NumPy ``.npz`` archives of images or feature vectors."""

import hashlib
import math
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.filesystem import to_path
from data.readers.base import Chunk, Reader, Row

MOST_CLASSES = 1_000_000
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200  # an array that exceeds both when unpacked is refused as a decompression bomb


@dataclass(frozen=True)
class NpzReader(Reader):
    """Reads an ``.npz`` file: ``x_<split>``, ``y_<split>`` (optional), ``classes`` (optional)."""

    path: str = ""

    def read(self, chunk: Chunk) -> Iterator[Row]:
        with to_path(self.path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            rows = arrays[f"x_{chunk.split}"][chunk.start : chunk.stop]
            name = f"y_{chunk.split}"
            labels = arrays[name][chunk.start : chunk.stop] if name in arrays.files else np.full(len(rows), -1)
        for offset, (row, label) in enumerate(zip(rows, labels, strict=True)):
            yield Row(f"x_{chunk.split}/{chunk.start + offset}", int(label), row)


def npz_reader(path: Path, domain: str) -> Reader:
    """Open an ``.npz`` file and check its content.

    Raises:
        ValueError: it is not such a file, or its arrays do not fit together.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _check_sizes(path, arrays)
            splits = [name[2:] for name in arrays.files if name.startswith("x_")]
            if not splits:
                raise ValueError(f"{path} has no x_<split> array: it has {', '.join(arrays.files) or 'none'}")
            counts, native, channels, classes, notes = _check_arrays(path, arrays, splits)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable .npz file ({str(error)[:200]})") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not a readable .npz file of plain arrays ({error})") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return NpzReader(domain, classes, native, channels, counts, {"name": path.name, "sha256": digest}, notes, path=str(path.resolve()))


def _check_sizes(path: Path, arrays: Any) -> None:
    """Refuse arrays that would fill the memory, before reading them: false headers, and archives that unpack to far more.

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
            if dtype.hasobject:
                raise ValueError(f"{path}: {each.filename[:80]!r} contains Python objects: save numbers, for example as np.uint8")
            claimed = math.prod(shape) * dtype.itemsize
            if claimed != each.file_size - file.tell():
                raise ValueError(f"{path}: {each.filename[:80]!r} claims {claimed:,} bytes and has {each.file_size - file.tell():,}")


def _check_arrays(path: Path, arrays: Any, splits: list[str]) -> tuple[dict[str, int], tuple[int, ...], int, tuple[str, ...], tuple[str, ...]]:
    """Rows by split, shape of a row, channels, class names, and notes on labels.

    Raises:
        ValueError: the arrays do not fit together.
    """
    counts, shapes, present = {}, set(), set()
    for split in splits:
        x, labels = arrays[f"x_{split}"], arrays[f"y_{split}"] if f"y_{split}" in arrays.files else None
        images = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and {1, 3} & {x.shape[1], x.shape[3]}))
        if not images and not (x.ndim == 2 and np.issubdtype(x.dtype, np.floating)):
            raise ValueError(f"{path}: x_{split} is {x.dtype} {list(x.shape)}, neither uint8 images nor (n, features) floats")
        if not len(x):
            raise ValueError(f"{path}: x_{split} is empty")
        if labels is not None and labels.dtype.kind in "SU":
            raise ValueError(f"{path}: y_{split} contains text: give class indices, and the names as the array `classes`")
        if labels is not None and (labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"{path}: y_{split} is {labels.dtype} {list(labels.shape)}, not {len(x)} integers")
        if labels is not None and not -1 <= labels.min() <= labels.max() < MOST_CLASSES:
            raise ValueError(f"{path}: y_{split} has labels from {labels.min()} to {labels.max()}, but they are class indices from 0, or -1 for none")
        present |= set(np.unique(labels[labels >= 0]).tolist()) if labels is not None else set()
        counts[split] = len(x)
        shapes.add(x.shape[1:])
    if len(shapes) > 1:
        raise ValueError(f"{path}: its splits have different shapes: {', '.join(map(str, shapes))}")
    shape = shapes.pop()
    if len(shape) == 1:
        native, channels = shape, 0
    else:
        last = len(shape) == 3 and shape[2] in (1, 3)
        channels = 1 if len(shape) == 2 else shape[2] if last else shape[0]
        native = shape if len(shape) == 2 else shape[:2] if last else shape[1:]
    names = arrays["classes"] if "classes" in arrays.files else None
    return counts, native, channels, *_classes(path, names, present)


def _classes(path: Path, given: np.ndarray | None, present: set[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names, and notes on classes without rows.

    Raises:
        ValueError: a name occurs twice, or the labels do not fit the names, or are no indices.
    """
    top = max(present, default=-1)
    if given is None:
        if 2 * len(present) < top + 1:
            raise ValueError(f"{path}: labels go up to {top}, but only {len(present)} occur: use -1 for unknown labels, or give the array `classes`")
        classes = tuple(map(str, range(top + 1)))
    else:
        classes = tuple(unicodedata.normalize("NFC", name.decode(errors="replace") if isinstance(name, bytes) else str(name)) for name in given)
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(classes) < 10_000 else []
    if twice:
        raise ValueError(f"{path}: class {twice[0]!r} is named twice")
    if top >= len(classes):
        raise ValueError(f"{path}: label {top}, but only {len(classes)} class names")
    empty = [name for label, name in enumerate(classes) if label not in present] if present else []
    notes = [f"{len(empty)} classes have no row: {', '.join(empty[:5])}"] if empty else []
    if given is None and present and 0 not in present:
        notes.append("no row has label 0: are the labels counted from 1?")
    return classes, tuple(notes)
