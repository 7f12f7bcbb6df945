"""Command: metrics and plots of a run or a registered model."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.filesystem import to_path
from data.manifest import Manifest
from models.method import Method
from pipelines.console.config import option, positional
from pipelines.registry.connection import default_uri
from pipelines.registry.encoders import RegisteredEncoder
from pipelines.retrieval.evaluation import (
    PROTOCOLS,
    Encode,
    MethodEncoder,
    cosines,
    encode_split,
    evaluate,
    evaluate_run,
    features_of,
    print_metrics,
    retrieval_metrics,
)  # fmt: skip
from pipelines.training import runs
from pipelines.training.restore import device_for, load_method


@dataclass
class Config:
    """Options of ``hashbridge evaluate``."""

    model: str = positional("a run's id, or models:/NAME@ALIAS; several with commas, such as the runs of three draws of the queries, for their mean")
    dataset: str = option("", "folder of the dataset (default: the run's)")
    protocol: str = option("", "cross: database is the source's train split; target: the target's (default: both)", PROTOCOLS)
    query: str = option("", "DOMAIN/SPLIT to query with, in place of a protocol")
    database: str = option("", "DOMAIN/SPLIT to query, in place of a protocol")
    ties: str = option("expected", "expected: mean over the orders of ties; stable: database order, as older programs", ("expected", "stable"))
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    gpu: bool = option(False, "encode on a GPU")
    out: str = option("", "folder for the plots (default: the run's own; none for a model)")


def run(config: Config) -> dict[str, Any]:
    """Evaluate a run or a registered model; returns its metrics."""
    if bool(config.query) != bool(config.database):
        raise ValueError("--query and --database belong together: give both or neither")
    for name in (config.query, config.database):
        if name and "/" not in name:
            raise ValueError(f"{name!r} is not DOMAIN/SPLIT, such as mnist/test")
    if config.query and config.query == config.database:
        raise ValueError(f"query and database are both {config.query}: a query must not find itself; take another split")
    protocols = (config.protocol,) if config.protocol else PROTOCOLS
    found = []
    for name in config.model.split(","):
        result = (_run_model if name.startswith("models:/") else _run_run)(replace(config, model=name), protocols)
        if "," in config.model:
            print(f"{name}:")
        print_metrics(result["metrics"], result["notes"])
        found.append(result)
    return found[0] if len(found) == 1 else _mean(found)


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the metrics that several results have, printed and returned with the single results."""
    shared = [name for name in found[0]["metrics"] if all(name in each["metrics"] for each in found)]
    columns = {name: [each["metrics"][name] for each in found] for name in shared}
    means, deviations = ({name: how(values) for name, values in columns.items()} for how in (statistics.mean, statistics.stdev))
    print(f"mean of {len(found)} (standard deviation):")
    for name in shared:
        print(f"  {name:<34} {means[name]:.4f} ({deviations[name]:.4f})")
    return {"model": ",".join(each["model"] for each in found), "metrics": means, "deviations": deviations, "single": found}


def _run_run(config: Config, protocols: tuple[str, ...]) -> dict[str, Any]:
    folder = runs.find_run(config.model, config.storage)
    root = to_path(config.dataset or runs.read_config(folder)["dataset"])
    manifest = Manifest.read(root)
    if not config.query:
        out = to_path(config.out) if config.out else None
        return {"model": folder.name} | evaluate_run(folder, root, manifest, protocols, config.ties, True, out, config.gpu)
    method = load_method(folder, manifest, device_for(config.gpu))
    return {"model": folder.name} | _pair(MethodEncoder(method), root, manifest, config, method)


def _pair(encode: Encode, root: Path, manifest: Manifest, config: Config, method: Method | None = None) -> dict[str, Any]:
    also = features_of(method) if method is not None else {}
    query, database = (encode_split(encode, root, manifest, name, **also) for name in (config.query, config.database))
    figures, notes = retrieval_metrics(query, database, config.ties)
    figures |= cosines(query, database)
    return {"metrics": {f"{config.query} in {config.database}/{name}": value for name, value in figures.items()}, "notes": notes}


def _run_model(config: Config, protocols: tuple[str, ...]) -> dict[str, Any]:
    if not config.dataset:
        raise ValueError("--dataset is missing: a registered model does not carry its data")
    root = to_path(config.dataset)
    manifest = Manifest.read(root)
    encoder = RegisteredEncoder(config.model, config.tracking or default_uri(config.storage), config.gpu)
    if list(encoder.shape) != manifest.shape:
        raise ValueError(f"{config.model} takes rows of shape {list(encoder.shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if config.query:
        return {"model": config.model} | _pair(encoder, root, manifest, config)
    tags = encoder.tags(config.model)
    out = to_path(config.out) if config.out else None
    return {"model": config.model} | evaluate(encoder, root, manifest, tags["source"], tags["target"], protocols, config.ties, None, out)
