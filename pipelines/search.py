"""Command: find the images of an index that are nearest to query images."""

from dataclasses import dataclass
from typing import Any

from data.filesystem import to_path
from pipelines.console.config import option, positional
from pipelines.registry.encoders import open_encoder
from pipelines.retrieval import search_index
from pipelines.retrieval.plots import grid, picture
from pipelines.retrieval.queries import load_origin, load_queries


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


def run(config: Config) -> dict[str, Any]:
    """Search; returns each query with its answers: id, label, Hamming distance."""
    index, rows, meta = search_index.read(to_path(config.index))
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
        if len(encoder.shape) != 3:
            raise ValueError("--grid needs images, and this model takes feature vectors")
        pictures = [[picture(load_origin(origins[n], encoder.shape)) for n in near if n >= 0] for near in found[:20]]
        right = [[known[n] == label if label >= 0 <= known[n] else None for n in near if n >= 0] for label, near in zip(labels, found[:20], strict=False)]
        grid([picture(each) for each in x[:20]], pictures, right, f"{len(names[:20])} queries in {to_path(config.index).name}", to_path(config.grid))
        print(f"picture in {config.grid}")
    return {"queries": [{"query": name, "answers": near} for name, near in zip(names, answers, strict=True)]}
