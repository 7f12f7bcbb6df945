"""Evaluates an encoder under the retrieval protocols: encodes the splits, computes metrics, draws plots."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.decoding import Decoded, read_decoded, split_name
from data.manifest import Manifest
from data.rows import DomainBatch
from models.codes import pack
from models.encoder import HashEncoder, encode_all
from models.method import Method, classify_encoded
from pipelines.retrieval import metrics
from pipelines.retrieval.metrics import Encoded
from pipelines.training import runs
from pipelines.training.restore import CPU, device_for, load_method
from pipelines.training.transfer import from_device, on_device

Encode = Callable[[np.ndarray], np.ndarray]
Map = Callable[[Tensor, Tensor], Tensor]  # of rows as stored (n, ...) and their relaxed codes (n, bits), on the method's device
PROTOCOLS = ("cross", "target")


class MethodEncoder:
    """Rows as stored to the packed codes of a method's encoder, on the method's device."""

    def __init__(self, method: Method) -> None:
        self.network, self.device = HashEncoder(method.encoder()).eval(), method.device

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) to (n, bits / 8) uint8."""
        return encode_all(self.network, torch.from_numpy(rows)).numpy()


def _on_device(parts: Iterable[Decoded], device: torch.device) -> Iterator[tuple[Decoded, Tensor]]:
    """Pair batches with their rows on a device; a GPU receives the next batch while it works on one."""
    waiting = deque[Decoded]()

    def batches() -> Iterator[tuple[DomainBatch]]:
        for each in parts:
            waiting.append(each)
            yield (DomainBatch(each.x, (), None, torch.tensor(each.row)),)

    for (batch,) in on_device(batches(), device):
        assert batch is not None
        yield waiting.popleft(), batch.x


def encode_split(encode: Encode, root: Path, manifest: Manifest, name: str, **also: Map) -> Encoded:
    """Encode a split batch by batch; its images are never in memory at once.

    Args:
        name: DOMAIN/SPLIT.
        also: what else to compute, by a ``MethodEncoder`` alone; the results are ``more`` of the returned value, by name.
    """
    labels, found = list[np.ndarray](), dict[str, list[np.ndarray]]()
    device = encode.device if isinstance(encode, MethodEncoder) else CPU

    def made() -> Iterator[tuple[Decoded, dict[str, Tensor]]]:
        for part, x in _on_device(read_decoded(root, manifest, *split_name(name), gpu=device.type == "cuda"), device):
            if isinstance(encode, MethodEncoder):
                relaxed = encode.network.network(x)
                yield part, {"codes": pack(relaxed)} | {each: compute(x, relaxed) for each, compute in also.items()}
            else:
                yield part, {"codes": torch.from_numpy(encode(part.x.numpy()))}

    with torch.no_grad():
        for part, computed in from_device(made(), device):
            labels.append(part.labels)
            for each, values in computed.items():
                found.setdefault(each, []).append(values.numpy())
    joined = {each: np.concatenate(parts) for each, parts in found.items()}
    return Encoded(joined.pop("codes"), np.concatenate(labels), name, joined)


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


def accuracy(guesses: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the labelled queries that a method classifies correctly; both are indices of the method's classes."""
    labelled = labels >= 0
    return float((guesses == labels)[labelled].mean())


def set_references(method: Method, source: Encoded, labels: np.ndarray) -> None:
    """Give a method the labelled codes of the source; labels are indices of the method's classes."""
    codes = torch.from_numpy(np.unpackbits(source.codes, axis=1, bitorder="little").astype(np.float32) * 2 - 1)
    known = labels >= 0
    method.set_references(codes[known].to(method.device), torch.from_numpy(labels[known]).to(method.device))


def features_of(method: Method) -> dict[str, Map]:
    """How to compute the features that a method makes its codes of, as an argument of ``encode_split``; nothing if it has none."""
    return {"features": lambda x, _: method.features(x)} if method.has_features else {}


def cosines(query: Encoded, database: Encoded, leave_one_out: bool = False) -> dict[str, float]:
    """P@k with ranking by cosine similarity of features, named ``cosine_precision_at_k``; nothing if there are no features."""
    if "features" not in query.more:
        return {}
    found = metrics.cosine_precisions(query.more["features"], query.labels, database.more["features"], database.labels, leave_one_out)
    return {f"cosine_{name}": value for name, value in found.items()}


def evaluate_run(
    folder: Path, root: Path, manifest: Manifest, protocols: tuple[str, ...] = PROTOCOLS, ties: str = "expected", plots: bool = True,
    out: Path | None = None, gpu: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a run by protocol, its classification accuracy, and its plots."""
    method, config = load_method(folder, manifest, device_for(gpu)), runs.read_config(folder)
    return evaluate(
        MethodEncoder(method), root, manifest, config["source"], config["target"], protocols, ties, method,
        (out or folder / "plots") if plots else None, config.get("classes"),
    )  # fmt: skip


class _Splits:
    """The encoded splits of an evaluation by DOMAIN/SPLIT, each encoded when it is first asked for.

    Attributes:
        known: whether any query has a label.
        classifies: whether the queries also have the classes that a method gives them, ``guesses``.
    """

    def __init__(
        self, encode: Encode, root: Path, manifest: Manifest, source: str, queries: str, method: Method | None, trained: list[str]
    ) -> None:  # fmt: skip
        self.encode, self.root, self.manifest, self.references, self.queries, self.method = encode, root, manifest, f"{source}/train", queries, method
        self.trained, self.made = trained, dict[str, Encoded]()
        self.known = any(manifest.split(*split_name(queries)).labels)
        self.classifies = method is not None and method.can_classify and self.known

    def __getitem__(self, name: str) -> Encoded:
        if name not in self.made:
            self.made[name] = self._encoded(name, classify=name == self.queries and self.classifies)
        return self.made[name]

    def _encoded(self, name: str, classify: bool) -> Encoded:
        method = self.method
        also = {} if method is None else features_of(method)
        if method is not None and classify:
            references = self._encoded(name, classify=False) if name == self.references else self[self.references]
            set_references(method, references, self.class_labels(references))
            also["guesses"] = lambda x, relaxed: classify_encoded(method, x, relaxed).argmax(1)
        return encode_split(self.encode, self.root, self.manifest, name, **also)

    def class_labels(self, split: Encoded) -> np.ndarray:
        """A split's labels as indices of the classes that the method was trained on."""
        return trained_labels(self.trained, self.manifest.classes, split.labels)


def _accuracy(queries: Encoded, labels: np.ndarray, trained_on: bool) -> tuple[dict[str, float], list[str]]:
    """The accuracy of the queries' guesses, and notes on it.

    Args:
        labels: of the queries, indices of the method's classes.
        trained_on: whether the method was trained on the queries' domain with its labels.
    """
    notes, unknown = [], int(((labels < 0) & (queries.labels >= 0)).sum())
    if unknown:
        notes.append(f"accuracy: {unknown:,} queries of classes that the run was not trained on are left out")
    if trained_on and queries.name.endswith("/train"):
        notes.append("accuracy: the queries were trained on")
    return {"accuracy": accuracy(queries.more["guesses"], labels)} if (labels >= 0).any() else {}, notes


def evaluate(
    encode: Encode, root: Path, manifest: Manifest, source: str, target: str, protocols: tuple[str, ...], ties: str,
    method: Method | None, out: Path | None, trained: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics by protocol, accuracy if a method is given, and plots into a folder if one is given.

    Args:
        trained: class names that the method was trained on, in order; the dataset's if None.
    """
    splits = _Splits(encode, root, manifest, source, protocol_splits(manifest, source, target, "cross")[0], method, trained or manifest.classes)
    figures: dict[str, float] = {}
    notes: list[str] = []
    last: tuple[Encoded, Encoded] | None = None
    if not splits.known:
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
        if last is None and (splits.known or out is not None):
            last = splits[query], splits[database]
        if not splits.known:
            continue
        if alone:
            notes.append(f"{protocol}: {target} has no test split; each query is left out of its own ranking")
        try:
            measured, left_out = retrieval_metrics(splits[query], splits[database], ties, alone)
        except ValueError as error:
            notes.append(f"{protocol}: not measured: {error}")
            continue
        measured |= cosines(splits[query], splits[database], alone)
        figures |= {f"{protocol}/{name}": value for name, value in measured.items()}
        notes += [f"{protocol}: {each}" for each in left_out]
    if splits.classifies:
        found, left_out = _accuracy(splits[splits.queries], splits.class_labels(splits[splits.queries]), source == target)
        figures |= found
        notes += left_out
    if out is not None and last is not None:
        from pipelines.retrieval.plots import draw_all  # noqa: PLC0415  matplotlib is slow to import

        draw_all(*last, root, manifest, out)
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
