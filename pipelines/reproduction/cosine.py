"""The figures of a dataset's features themselves, ranked by cosine."""

from functools import cache
from pathlib import Path

import numpy as np

from data.manifest import Manifest
from pipelines.retrieval import evaluation
from pipelines.retrieval.metrics import Encoded, cosine_precisions, labelled


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows as L2-normalised vectors."""
    vectors = x.reshape(len(x), -1).astype(np.float32)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def mean_average_precision(queries: Encoded, database: Encoded, own: bool = False) -> float:
    """mAP by cosine, over the labelled queries of classes that the database has; its unlabelled rows are left out.

    Args:
        own: the queries are the database's rows; each is left out of its own ranking.
    """
    (asked, wanted), (rows, labels) = (labelled(each.codes, each.labels) for each in (queries, database))
    found = []
    for place, (query, label) in enumerate(zip(asked, wanted, strict=True)):
        order = np.argsort(-(rows @ query), kind="stable")
        alike = labels[order[order != place] if own else order] == label
        hits = np.cumsum(alike)
        if hits[-1]:
            found.append(float((hits[alike] / (np.flatnonzero(alike) + 1)).mean()))
    return float(np.mean(found))


def by_cosine(root: Path, manifest: Manifest, pair: tuple[str, str]) -> dict[str, float]:
    """mAP and P@k of the target's queries in the source's and the target's training rows, named as a method's."""
    return dict(_measured(root, manifest.digest(), pair))


@cache
def _measured(root: Path, digest: str, pair: tuple[str, str]) -> dict[str, float]:
    manifest, found = Manifest.read(root), dict[str, float]()
    for name in ("cross", "target") if pair[0] else ("target",):
        query, database = evaluation.protocol_splits(manifest, pair[0], pair[1], name)
        splits = [evaluation.encode_split(unit_rows, root, manifest, each) for each in (query, database)]
        own = query == database
        precisions = cosine_precisions(splits[0].codes, splits[0].labels, splits[1].codes, splits[1].labels, own)
        found |= {f"{name}/{prefix}{key}": value for key, value in precisions.items() for prefix in ("", "cosine_")}
        found[f"{name}/map"] = mean_average_precision(splits[0], splits[1], own)
    return found
