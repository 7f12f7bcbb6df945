"""Stage: codes of queries and database to metrics and plots."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.manifest import Manifest
from data.places import path_of
from data.shards import read_rows, to_arrays
from models.encoder import HashEncoder, encode_all
from models.method import Method
from models.registry import find
from pipelines import checkpoint, metrics, runs
from pipelines.config import build, option, positional
from pipelines.metrics import Encoded

Encode = Callable[[np.ndarray], np.ndarray]
PROTOCOLS = ("cross", "target")


@dataclass
class Config:
    """Options of ``hashbridge evaluate``."""

    model: str = positional("a run's id, or models:/NAME@ALIAS")
    dataset: str = option("", "folder of the dataset (default: the run's)")
    protocol: str = option("", "cross: database is the source's train split; target: the target's (default: both)", PROTOCOLS)
    query: str = option("", "DOMAIN/SPLIT to query with, in place of a protocol")
    database: str = option("", "DOMAIN/SPLIT to query, in place of a protocol")
    ties: str = option("expected", "expected: mean over the orders of ties; stable: database order, as older programs", ("expected", "stable"))
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    out: str = option("", "folder for the plots (default: the run's own; none for a model)")


def load_method(folder: Path, manifest: Manifest | None = None) -> Method:
    """The trained method of a run, for a dataset where one is given.

    Raises:
        ValueError: it has no checkpoint, or one of other data.
    """
    config = runs.read_config(folder)
    place = checkpoint.latest(folder / "checkpoints")
    if place is None:
        raise ValueError(f"run {folder.name} has no checkpoint yet")
    state = checkpoint.read_state(place)
    if manifest and state["shape"] != manifest.shape:
        raise ValueError(f"run {folder.name} takes rows of shape {state['shape']}, dataset {manifest.dataset!r} has {manifest.shape}")
    kind = find(state["method"])
    if "pretrained" in config["own"]:
        config["own"]["pretrained"] = "none"  # the checkpoint holds the weights
    method = kind(build(kind.Config, config["own"]), tuple(state["shape"]), state["classes"], state["bits"])
    checkpoint.load(place, method, optimizers=False)
    return method.train(False)


def encode_split(encode: Encode, root: Path, manifest: Manifest, domain: str, split: str) -> Encoded:
    """Encode a split with its labels."""
    batches = list(read_rows(root, manifest, domain, split))
    x = np.concatenate([to_arrays(batch, manifest) for batch in batches])
    labels = np.concatenate([batch.column("label").to_numpy() for batch in batches]).astype(np.int64)
    return Encoded(encode(x), labels, x, f"{domain}/{split}")


def protocol_splits(manifest: Manifest, source: str, target: str, protocol: str) -> tuple[str, str]:
    """Query and database of a protocol, as DOMAIN/SPLIT.

    Without a test split the target's train split is the query set (the transductive protocol); ``target`` then leaves
    each query out of its own ranking.
    """
    query = f"{target}/test" if "test" in manifest.domains[target].splits else f"{target}/train"
    return query, f"{source if protocol == 'cross' else target}/train"


def measure(query: Encoded, database: Encoded, ties: str = "expected", leave_one_out: bool = False) -> dict[str, float]:
    """All retrieval metrics of a query set against a database.

    Raises:
        ValueError: they share rows, and each query is not left out of its own ranking.
    """
    if query.name == database.name and not leave_one_out:
        raise ValueError(f"query and database are both {query.name}: a query must not find itself; take another split")
    figures = metrics.summarise(metrics.histograms(query.codes, query.labels, database.codes, database.labels, own=leave_one_out))
    if ties == "stable":
        figures["map_stable"] = float(
            np.nanmean(metrics.stable_average_precisions(query.codes, query.labels, database.codes, database.labels))
        )
    return figures


def accuracy(method: Method, source: Encoded, query: Encoded) -> float:
    """Share of the labelled queries that the method's own recognition gets right."""
    codes = torch.from_numpy(np.unpackbits(source.codes, axis=1, bitorder="little").astype(np.float32) * 2 - 1)
    known = source.labels >= 0
    method.set_references(codes[known], torch.from_numpy(source.labels[known]))
    with torch.no_grad():
        guesses = torch.cat([method.classify(part).argmax(1) for part in torch.from_numpy(query.x).split(512)]).numpy()
    labelled = query.labels >= 0
    return float((guesses == query.labels)[labelled].mean())


@torch.no_grad()
def features_of(method: Method, x: np.ndarray) -> np.ndarray:
    """The features (n, width) that a method makes its codes of."""
    return torch.cat([method.features(part) for part in torch.from_numpy(x).split(512)]).numpy()


def cosines(query: Encoded, of_query: np.ndarray, database: Encoded, of_database: np.ndarray, leave_one_out: bool = False) -> dict[str, float]:
    """P@k by the cosine of features, as ``cosine_precision_at_k``."""
    found = metrics.cosine_precisions(of_query, query.labels, of_database, database.labels, leave_one_out)
    return {f"cosine_{name}": value for name, value in found.items()}


def evaluate_run(
    folder: Path, root: Path, manifest: Manifest, protocols: tuple[str, ...] = PROTOCOLS, ties: str = "expected", plots: bool = True,
    out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a run by protocol, its recognition accuracy, and its plots."""
    method = load_method(folder, manifest)
    encoder = HashEncoder(method.encoder()).eval()
    config = runs.read_config(folder)
    return _evaluate(
        lambda x: encode_all(encoder, torch.from_numpy(x)).numpy(), root, manifest, config["source"], config["target"], protocols,
        ties, method, (out or folder / "plots") if plots else None,
    )  # fmt: skip


def _evaluate(
    encode: Encode, root: Path, manifest: Manifest, source: str, target: str, protocols: tuple[str, ...], ties: str,
    method: Method | None, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    splits: dict[str, Encoded] = {}

    def encoded(name: str) -> Encoded:
        if name not in splits:
            splits[name] = encode_split(encode, root, manifest, *name.rsplit("/", 1))
        return splits[name]

    embedded: dict[str, np.ndarray] = {}

    def features(name: str) -> np.ndarray:
        if name not in embedded:
            assert method is not None
            embedded[name] = features_of(method, encoded(name).x)
        return embedded[name]

    figures: dict[str, float] = {}
    notes: list[str] = []
    last: tuple[Encoded, Encoded] | None = None
    known = bool((encoded(protocol_splits(manifest, source, target, "cross")[0]).labels >= 0).any())
    if not known:
        notes.append(f"target {target!r} has no label to measure with: no metrics")
    for protocol in protocols:
        if protocol == "cross" and not source:
            notes.append("cross: left out, as there is no source")
            continue
        query, database = protocol_splits(manifest, source, target, protocol)
        alone = query == database
        if alone and protocol == "cross":
            notes.append(f"cross: left out, as query and database are both {query}")
            continue
        if known:
            measured = measure(encoded(query), encoded(database), ties, alone)
            if method is not None and method.embeds:
                measured |= cosines(encoded(query), features(query), encoded(database), features(database), alone)
            figures |= {f"{protocol}/{name}": value for name, value in measured.items()}
        if known and alone:
            notes.append(f"{protocol}: {target} has no test split; each query is left out of its own ranking")
        last = last or (encoded(query), encoded(database))
    if method is not None and method.recognises and known:
        query = protocol_splits(manifest, source, target, "cross")[0]
        figures["accuracy"] = accuracy(method, encoded(f"{source}/train"), encoded(query))
        if source == target and query.endswith("/train"):
            notes.append("accuracy: the queries were trained on")
    if out is not None and last is not None:
        from pipelines import plots  # noqa: PLC0415  matplotlib is slow to import

        plots.draw_all(*last, manifest, out)
    return {"metrics": figures, "notes": notes}


def show(figures: dict[str, float], notes: list[str], oracle: bool = False) -> None:
    """Print the main figures as a small table."""
    mark = "  (oracle: trained with target labels)" if oracle else ""
    if "accuracy" in figures:
        print(f"accuracy {figures['accuracy']:.4f}{mark}")
    tables: dict[str, list[str]] = {}
    for name, value in figures.items():
        table, _, metric = name.rpartition("/")
        tables.setdefault(table, []).append(f"{metric} {value:.4f}")
    for table, shown in tables.items():
        if table:
            print(f"{table:<7} " + "  ".join(shown))
    for note in notes:
        print(f"note: {note}")


def run(config: Config) -> dict[str, Any]:
    """Evaluate a run or a registered model; returns its metrics."""
    if bool(config.query) != bool(config.database):
        raise ValueError("--query and --database belong together: give both or neither")
    for name in (config.query, config.database):
        if name and "/" not in name:
            raise ValueError(f"{name!r} is not DOMAIN/SPLIT, as in mnist/test")
    if config.query and config.query == config.database:
        raise ValueError(f"query and database are both {config.query}: a query must not find itself; take another split")
    protocols = (config.protocol,) if config.protocol else PROTOCOLS
    result = (_run_model if config.model.startswith("models:/") else _run_run)(config, protocols)
    show(result["metrics"], result["notes"])
    return result


def _run_run(config: Config, protocols: tuple[str, ...]) -> dict[str, Any]:
    folder = runs.find_run(config.model, config.storage)
    root = path_of(config.dataset or runs.read_config(folder)["dataset"])
    manifest = Manifest.read(root)
    if not config.query:
        out = path_of(config.out) if config.out else None
        return {"model": folder.name} | evaluate_run(folder, root, manifest, protocols, config.ties, True, out)
    method = load_method(folder, manifest)
    encoder = HashEncoder(method.encoder()).eval()
    return {"model": folder.name} | _pair(lambda x: encode_all(encoder, torch.from_numpy(x)).numpy(), root, manifest, config, method)


def _pair(encode: Encode, root: Path, manifest: Manifest, config: Config, method: Method | None = None) -> dict[str, Any]:
    query, database = (encode_split(encode, root, manifest, *name.rsplit("/", 1)) for name in (config.query, config.database))
    figures = measure(query, database, config.ties)
    if method is not None and method.embeds:
        figures |= cosines(query, features_of(method, query.x), database, features_of(method, database.x))
    return {"metrics": {f"{config.query} in {config.database}/{name}": value for name, value in figures.items()}, "notes": []}


def _run_model(config: Config, protocols: tuple[str, ...]) -> dict[str, Any]:
    from pipelines.tracking import RegisteredEncoder, default_uri  # noqa: PLC0415

    if not config.dataset:
        raise ValueError("--dataset is missing: a registered model does not carry its data")
    root = path_of(config.dataset)
    manifest = Manifest.read(root)
    encoder = RegisteredEncoder(config.model, config.tracking or default_uri(config.storage))
    if list(encoder.shape) != manifest.shape:
        raise ValueError(f"{config.model} takes rows of shape {list(encoder.shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if config.query:
        return {"model": config.model} | _pair(encoder, root, manifest, config)
    tags = encoder.tags(config.model)
    out = path_of(config.out) if config.out else None
    return {"model": config.model} | _evaluate(encoder, root, manifest, tags["source"], tags["target"], protocols, config.ties, None, out)
