"""Command: find the images of an index that are nearest to query images."""

from dataclasses import dataclass
from typing import Any

from data.filesystem import to_path
from pipelines.console.config import RANGE, option, positional, value_range
from pipelines.registry.encoders import check_encodes, open_encoder, resolve
from pipelines.retrieval.queries import class_name, load_origin, load_queries, queried_dataset
from pipelines.retrieval.sharded_index import open_index


@dataclass
class Config:
    """Options of ``hashbridge search``."""

    index: str = positional("folder that `hashbridge index` wrote")
    images: str = positional("an image, a folder of images, or DATASET#DOMAIN/SPLIT#FIRST-LAST")
    model: str = option("", "models:/NAME@ALIAS, or a run's id (default: the one that encoded the index)")
    k: int = option(10, "answers to each query")
    grid: str = option("", "PNG file of queries and answers")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    probes: int = option(0, "ivf: lists of a shard that a query visits first (default: the index's, or an eighth; more if they hold fewer than k images)")
    range: str = option("", RANGE)

    def __post_init__(self) -> None:
        value_range(self.range)
        if self.k < 1:
            raise ValueError(f"-k is {self.k}, but must be at least 1")
        if self.probes < 0:
            raise ValueError(f"--probes is {self.probes}, but must not be negative")


def run(config: Config) -> dict[str, Any]:
    """Search; returns each query with its answers: id, label, class name, Hamming distance."""
    index, values = open_index(to_path(config.index)), value_range(config.range)
    model = resolve(config.model or index.manifest["model"], config.storage, config.tracking)
    check_encodes(model, index.manifest["model"], config.storage, config.tracking)
    encoder = open_encoder(model.name, config.storage, config.tracking, rows=queried_dataset(config.images))
    if encoder.bits != index.manifest["bits"]:
        raise ValueError(f"the model gives {encoder.bits} bits, the index holds {index.manifest['bits']}: search with the model that encoded it")
    queries = load_queries(config.images, encoder.shape, values)
    found = index.search(encoder(queries.x), config.k, config.probes)
    answers = [
        [
            {"id": row["id"], "label": row["label"], "class": class_name(row["label"], index.manifest["classes"]), "distance": far}
            for row, far in zip(near, distances, strict=True)
        ]
        for near, distances in zip(found.rows, found.distances, strict=True)
    ]  # fmt: skip
    for name, true, near in zip(queries.names, queries.classes, answers, strict=True):
        print(name + (f" (class {true})" if true else ""))
        for rank, answer in enumerate(near, 1):
            shown = f"  class {answer['class']}" if answer["class"] else ""
            print(f"  {rank:>3}  distance {answer['distance']:>3}  {answer['id']}{shown}")
    if config.grid:
        if len(encoder.shape) != 3:
            raise ValueError("--grid needs images, and this model takes feature vectors")
        from pipelines.retrieval.plots import grid, picture  # noqa: PLC0415  matplotlib is slow to import

        pictures = [[picture(load_origin(row["origin"], encoder.shape, values)) for row in near] for near in found.rows[:20]]
        pairs = zip(queries.classes, answers[:20], strict=False)
        right = [[each["class"] == true if true and each["class"] else None for each in near] for true, near in pairs]
        title = f"{len(queries.names[:20])} queries in {to_path(config.index).name}"
        grid([picture(each) for each in queries.x[:20]], pictures, right, title, to_path(config.grid))
        print(f"picture in {config.grid}")
    every = zip(queries.names, queries.classes, answers, strict=True)
    return {"queries": [{"query": name, "class": true, "answers": near} for name, true, near in every]}
