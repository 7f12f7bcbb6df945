"""Loads query images: an image, a folder of images, or rows of a dataset."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from data.decoding import decode_files, read_decoded
from data.filesystem import to_path
from data.images import decode, one_white
from data.manifest import Manifest
from data.readers.base import printable
from data.readers.folder import image_files
from pipelines.console.config import NO_RANGE


class Queries(NamedTuple):
    """Query images: names, rows as stored (n, ...), labels (-1 if unknown) and class names ("" if unknown)."""

    names: list[str]
    x: np.ndarray
    labels: list[int]
    classes: list[str]


def class_name(label: int, classes: list[str]) -> str:
    """The name of a label; the number itself if it has none, and "" if it is unknown."""
    return "" if label < 0 else classes[label] if label < len(classes) else str(label)


def load_queries(images: str, shape: tuple[int, ...], values: tuple[float, float] | None = None) -> Queries:
    """Load query images.

    Args:
        values: of image files, as in ``decode``.

    Raises:
        ValueError: there are none, or they do not fit the model.
    """
    if "#" in images and not to_path(images).exists():
        if values:
            raise ValueError(NO_RANGE)
        return _dataset_queries(images, shape)
    path = to_path(images)
    if not path.exists():
        raise ValueError(f"no image or folder {images!r}")
    if len(shape) != 3:
        raise ValueError("the model takes feature vectors: query with DATASET#DOMAIN/SPLIT#FIRST-LAST")
    files = [path] if path.is_file() else image_files(path)
    if not files:
        raise ValueError(f"{path} contains no image file")
    decoded, names, whites = [], [], list[float]()
    for file, image in zip(files, decode_files(files, shape, values=values, whites=whites), strict=True):
        if isinstance(image, np.ndarray):
            decoded.append(image)
            names.append(printable(str(file)))
        elif len(files) == 1:
            raise ValueError(f"{file} cannot be read: {image}")
        else:
            print(f"  left out {printable(str(file))}: {image}")
    if not decoded:
        raise ValueError(f"no image in {path} can be read")
    one_white(Counter(whites), images)
    return Queries(names, np.stack(decoded), [-1] * len(names), [""] * len(names))


def queried_dataset(images: str) -> Manifest | None:
    """The dataset that queries are rows of; None if they are image files."""
    root = to_path(images.rsplit("#", 2)[0])
    return Manifest.read(root) if "#" in images and not to_path(images).exists() and (root / "manifest.json").exists() else None


def parse_rows(text: str) -> tuple[str, str, str, int, int]:
    """Folder, domain, split, first row and the row after the last of DATASET#DOMAIN/SPLIT#FIRST-LAST.

    Raises:
        ValueError: the text is of another form.
    """
    try:
        root, name, rows = text.rsplit("#", 2)
        domain, split = name.rsplit("/", 1)
        first, _, last = rows.partition("-")
        return root, domain, split, int(first), int(last or first) + 1
    except ValueError:
        raise ValueError(f"{text!r} is neither a path nor DATASET#DOMAIN/SPLIT#FIRST-LAST") from None


def _dataset_queries(images: str, shape: tuple[int, ...]) -> Queries:
    root, domain, split, start, stop = parse_rows(images)
    name = f"{domain}/{split}"
    folder = to_path(root)
    manifest = Manifest.read(folder)
    if tuple(manifest.shape) != tuple(shape):
        raise ValueError(f"the model takes rows of shape {list(shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if not 0 <= start < stop <= manifest.split(domain, split).rows:
        raise ValueError(f"rows {start}-{stop - 1} are outside {name}, which has {manifest.split(domain, split).rows}")
    parts = list(read_decoded(folder, manifest, domain, split, start, stop))
    labels = [int(label) for part in parts for label in part.labels]
    x = torch.cat([part.x for part in parts]).numpy()
    return Queries([f"{name}#{row}" for row in range(start, stop)], x, labels, [class_name(label, manifest.classes) for label in labels])


def load_origin(origin: str, shape: tuple[int, ...], values: tuple[float, float] | None = None) -> np.ndarray:
    """The image (channels, h, w) that a code was made from; grey if it no longer exists. ``values`` as in ``load_queries``."""
    try:
        if "#" in origin and not to_path(origin).exists():
            return _dataset_queries(origin, shape).x[0]
        return decode(to_path(origin).read_bytes(), shape[0], shape[1], values)
    except (ValueError, OSError):
        return np.full(shape, 128, np.uint8)
