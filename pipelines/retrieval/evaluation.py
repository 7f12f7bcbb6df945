"""Evaluates an encoder under the retrieval protocols: encodes the splits, computes metrics, draws plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.manifest import Manifest
from data.shards import read_rows, to_arrays
from models.encoder import HashEncoder, encode_all
from models.method import Method
from pipelines.retrieval import metrics, plots
from pipelines.retrieval.metrics import Encoded
from pipelines.training import runs
from pipelines.training.restore import load_method

Encode = Callable[[np.ndarray], np.ndarray]
PROTOCOLS = ("cross", "target")


def encode_split(encode: Encode, root: Path, manifest: Manifest, domain: str, split: str) -> Encoded:
    """Encode a split; returns codes, labels and rows."""
    batches = list(read_rows(root, manifest, domain, split))
    x = np.concatenate([to_arrays(batch, manifest) for batch in batches])
    labels = np.concatenate([batch.column("label").to_numpy() for batch in batches]).astype(np.int64)
    return Encoded(encode(x), labels, x, f"{domain}/{split}")


def protocol_splits(manifest: Manifest, source: str, target: str, protocol: str) -> tuple[str, str]:
    """Query and database of a protocol, as DOMAIN/SPLIT.

    The query set is the target's test split, or its val split, or else its train split (the transductive protocol). In the last case
    protocol ``target`` excludes each query from its own ranking.
    """
    split = next((each for each in ("test", "val") if each in manifest.domains[target].splits), "train")
    return f"{target}/{split}", f"{source if protocol == 'cross' else target}/train"


def retrieval_metrics(query: Encoded, database: Encoded, ties: str = "expected", leave_one_out: bool = False) -> tuple[dict[str, float], list[str]]:
    """All retrieval metrics of a query set against a database.

    Returns:
        The metrics, and a note for each kind of row that was left out, with its number: database rows without a label, and
        queries without a label or without a relevant row.

    Raises:
        ValueError: both are the same split, and queries are not excluded from their own ranking; or nothing can be measured.
    """
    if query.name == database.name and not leave_one_out:
        raise ValueError(f"query and database are both {query.name}: a query must not find itself; take another split")
    histogram = metrics.distance_histograms(query.codes, query.labels, database.codes, database.labels, own=leave_one_out)
    figures, notes = metrics.summarise(histogram), []
    if unlabelled := int((database.labels < 0).sum()):
        notes.append(f"{unlabelled:,} of {len(database.labels):,} rows of database {database.name} have no label and are left out")
    if useless := int((histogram.relevant.sum(1) == 0).sum()):
        notes.append(f"{useless:,} of {len(query.labels):,} queries of {query.name} have no label or no relevant row and are left out")
    if ties == "stable":
        found = metrics.stable_average_precisions(query.codes, query.labels, database.codes, database.labels, own=leave_one_out)
        figures["map_stable"] = float(found[histogram.relevant.sum(1) > 0].mean())
    return figures, notes


def trained_labels(trained: list[str], classes: list[str], labels: np.ndarray) -> np.ndarray:
    """A dataset's labels as indices of the classes that a method was trained on, matched by name; -1 for unknown classes.

    Args:
        trained: class names of the method's outputs, in order.
        classes: class names of the dataset's labels, in order.
    """
    places = {name: place for place, name in enumerate(trained)}
    return np.array([places.get(name, -1) for name in classes] + [-1], np.int64)[labels]


def accuracy(method: Method, source: Encoded, query: Encoded) -> float:
    """Fraction of the labelled queries that the method classifies correctly; labels are indices of the method's classes."""
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
    """P@k with ranking by cosine similarity of features, named ``cosine_precision_at_k``."""
    found = metrics.cosine_precisions(of_query, query.labels, of_database, database.labels, leave_one_out)
    return {f"cosine_{name}": value for name, value in found.items()}


def evaluate_run(
    folder: Path, root: Path, manifest: Manifest, protocols: tuple[str, ...] = PROTOCOLS, ties: str = "expected", plots: bool = True,
    out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a run by protocol, its classification accuracy, and its plots."""
    method = load_method(folder, manifest)
    encoder = HashEncoder(method.encoder()).eval()
    config = runs.read_config(folder)
    return evaluate(
        lambda x: encode_all(encoder, torch.from_numpy(x)).numpy(), root, manifest, config["source"], config["target"], protocols,
        ties, method, (out or folder / "plots") if plots else None, config.get("classes"),
    )  # fmt: skip


def evaluate(
    encode: Encode, root: Path, manifest: Manifest, source: str, target: str, protocols: tuple[str, ...], ties: str,
    method: Method | None, out: Path | None, trained: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics by protocol, accuracy if a method is given, and plots into a folder if one is given.

    Args:
        trained: class names that the method was trained on, in order; the dataset's if None.
    """
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
        notes.append(f"target {target!r} has no labels: no metrics")
    for protocol in protocols:
        if protocol == "cross" and not source:
            notes.append("cross: left out, as there is no source")
            continue
        query, database = protocol_splits(manifest, source, target, protocol)
        alone = query == database
        if alone and protocol == "cross":
            notes.append(f"cross: left out, as query and database are both {query}")
            continue
        last = last or (encoded(query), encoded(database))
        if not known:
            continue
        if alone:
            notes.append(f"{protocol}: {target} has no test split; each query is left out of its own ranking")
        try:
            measured, left_out = retrieval_metrics(encoded(query), encoded(database), ties, alone)
        except ValueError as error:
            notes.append(f"{protocol}: not measured: {error}")
            continue
        if method is not None and method.has_features:
            measured |= cosines(encoded(query), features(query), encoded(database), features(database), alone)
        figures |= {f"{protocol}/{name}": value for name, value in measured.items()}
        notes += [f"{protocol}: {each}" for each in left_out]
    if method is not None and method.can_classify and known:
        query = protocol_splits(manifest, source, target, "cross")[0]
        known_classes = trained or manifest.classes
        rows = [each._replace(labels=trained_labels(known_classes, manifest.classes, each.labels)) for each in (encoded(f"{source}/train"), encoded(query))]
        unknown = int(((rows[1].labels < 0) & (encoded(query).labels >= 0)).sum())
        if unknown:
            notes.append(f"accuracy: {unknown:,} queries of classes that the run was not trained on are left out")
        if (rows[1].labels >= 0).any():
            figures["accuracy"] = accuracy(method, rows[0], rows[1])
        if source == target and query.endswith("/train"):
            notes.append("accuracy: the queries were trained on")
    if out is not None and last is not None:
        plots.draw_all(*last, manifest, out)
    return {"metrics": figures, "notes": notes}


def print_metrics(figures: dict[str, float], notes: list[str], oracle: bool = False) -> None:
    """Print the main metrics as a small table."""
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
