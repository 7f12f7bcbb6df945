"""Stage: the nearest images of an index to query images."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.images import decode
from data.manifest import Manifest
from data.places import path_of
from data.readers import image_files, printable
from data.shards import read_rows, to_arrays
from pipelines import index as indexes
from pipelines.config import option, positional
from pipelines.models_io import open_encoder


@dataclass
class Config:
    """Options of ``hashbridge search``."""

    index: str = positional("file that `hashbridge index` wrote")
    images: str = positional("an image, a folder of images, or DATASET#DOMAIN/SPLIT#FIRST-LAST")
    model: str = option("", "models:/NAME@ALIAS, or a run's id (default: the one that encoded the index)")
    k: int = option(10, "neighbours of each query")
    grid: str = option("", "PNG file of queries and answers")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"-k is {self.k}, but must be at least 1")


def load_queries(images: str, shape: tuple[int, ...]) -> tuple[list[str], np.ndarray, list[int]]:
    """Names, rows as stored (n, ...), and labels (-1 where unknown) of what the user queries with.

    Raises:
        ValueError: there is nothing, or it does not fit the model.
    """
    if "#" in images and not path_of(images).exists():
        return _dataset_queries(images, shape)
    path = path_of(images)
    if not path.exists():
        raise ValueError(f"no image or folder {images!r}")
    if len(shape) != 3:
        raise ValueError("the model takes feature vectors: query with DATASET#DOMAIN/SPLIT#FIRST-LAST")
    files = [path] if path.is_file() else image_files(path)
    if not files:
        raise ValueError(f"{path} holds no image file")
    decoded, names = [], []
    for file in files:
        try:
            decoded.append(decode(file.read_bytes(), shape[0], shape[1]))
            names.append(printable(str(file)))
        except ValueError as error:
            if len(files) == 1:
                raise ValueError(f"{file} cannot be read: {error}") from None
            print(f"  left out {printable(str(file))}: {error}")
    if not decoded:
        raise ValueError(f"not one image in {path} can be read")
    return names, np.stack(decoded), [-1] * len(names)


def _dataset_queries(images: str, shape: tuple[int, ...]) -> tuple[list[str], np.ndarray, list[int]]:
    try:
        root, name, rows = images.rsplit("#", 2)
        domain, split = name.rsplit("/", 1)
        first, _, last = rows.partition("-")
        start, stop = int(first), int(last or first) + 1
    except ValueError:
        raise ValueError(f"{images!r} is neither a path nor DATASET#DOMAIN/SPLIT#FIRST-LAST") from None
    folder = path_of(root)
    manifest = Manifest.read(folder)
    if tuple(manifest.shape) != tuple(shape):
        raise ValueError(f"the model takes rows of shape {list(shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if not 0 <= start < stop <= manifest.split(domain, split).rows:
        raise ValueError(f"rows {rows} are outside {name}, which has {manifest.split(domain, split).rows}")
    batches = list(read_rows(folder, manifest, domain, split, start, stop))
    labels = [int(label) for batch in batches for label in batch.column("label").to_pylist()]
    return [f"{name}#{row}" for row in range(start, stop)], np.concatenate([to_arrays(b, manifest) for b in batches]), labels


def load_origin(origin: str, shape: tuple[int, ...]) -> np.ndarray:
    """The image (channels, h, w) that a code was made of; grey where it is gone."""
    try:
        if "#" in origin and not path_of(origin).exists():
            return _dataset_queries(origin, shape)[1][0]
        return decode(path_of(origin).read_bytes(), shape[0], shape[1])
    except (ValueError, OSError):
        return np.full(shape, 128, np.uint8)


def run(config: Config) -> dict[str, Any]:
    """Search; returns each query with its answers: id, label, Hamming distance."""
    index, rows, meta = indexes.read(path_of(config.index))
    encoder = open_encoder(config.model or meta["model"], config.storage, config.tracking)
    if encoder.bits != int(meta["bits"]):
        raise ValueError(f"the model gives {encoder.bits} bits, the index holds {meta['bits']}: search with the model that encoded it")
    names, x, labels = load_queries(config.images, encoder.shape)
    distances, found = index.search(encoder(x), min(config.k, index.ntotal))
    ids, known, origins = (rows[name].to_pylist() for name in ("id", "label", "origin"))
    answers = [
        [{"id": ids[n], "label": known[n], "distance": int(d)} for n, d in zip(near, far, strict=True) if n >= 0]
        for near, far in zip(found, distances, strict=True)
    ]
    for name, label, near in zip(names, labels, answers, strict=True):
        print(name + (f" (label {label})" if label >= 0 else ""))
        for rank, answer in enumerate(near, 1):
            shown = f"  label {answer['label']}" if answer["label"] >= 0 else ""
            print(f"  {rank:>3}  distance {answer['distance']:>3}  {answer['id']}{shown}")
    if config.grid:
        from pipelines.plots import grid, picture  # noqa: PLC0415  matplotlib is slow to import

        if len(encoder.shape) != 3:
            raise ValueError("--grid needs images, and this model takes feature vectors")
        pictures = [[picture(load_origin(origins[n], encoder.shape)) for n in near if n >= 0] for near in found[:20]]
        right = [[known[n] == label if label >= 0 <= known[n] else None for n in near if n >= 0] for label, near in zip(labels, found[:20], strict=False)]
        grid([picture(each) for each in x[:20]], pictures, right, f"{len(names[:20])} queries in {path_of(config.index).name}", path_of(config.grid))
        print(f"picture in {config.grid}")
    return {"queries": [{"query": name, "answers": near} for name, near in zip(names, answers, strict=True)]}
