"""Command: make the challenger the champion if it is significantly better on the same queries, or roll back."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.filesystem import to_path
from data.manifest import Manifest
from pipelines.console.config import option, positional
from pipelines.registry import versions
from pipelines.registry.connection import default_uri
from pipelines.registry.encoders import RegisteredEncoder
from pipelines.retrieval import evaluation, metrics

SAME = ("dataset_digest", "source", "target")
RESAMPLES = 2000


@dataclass
class Config:
    """Options of ``hashbridge promote``."""

    name: str = positional("name of the registered model")
    dataset: str = option("", "folder of the dataset that both are measured on (default: the one that the challenger was trained on)")
    protocol: str = option("target", "target or cross: the queries and the database that decide", evaluation.PROTOCOLS)
    margin: float = option(0.0, "mAP by which the challenger must be better at the lower end of the interval")
    confidence: float = option(0.95, "confidence of the interval, by a paired bootstrap over the queries")
    seed: int = option(0, "seed of the bootstrap")
    rollback: bool = option(False, "make the champion before this one the champion again")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI (default: MLFLOW_TRACKING_URI, else SQLite in the storage)")

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence is {self.confidence}, but must lie between 0 and 1")


def interval(differences: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences (queries,)."""
    random, n = np.random.default_rng(seed), len(differences)
    means = np.array([differences[random.integers(0, n, n)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _precisions(uri: str, name: str, version: int, root: Path, manifest: Manifest, tags: dict[str, str], protocol: str) -> np.ndarray:
    """Average precision of each query by the codes of one version; nan if nothing is relevant."""
    encoder = RegisteredEncoder(f"models:/{name}/{version}", uri)
    query, database = evaluation.protocol_splits(manifest, tags["source"], tags["target"], protocol)
    splits = {each: evaluation.encode_split(encoder, root, manifest, each) for each in {query, database}}
    q, d = splits[query], splits[database]
    return metrics.average_precisions(metrics.distance_histograms(q.codes, q.labels, d.codes, d.labels, own=query == database))


def compare(uri: str, config: Config, challenger: Any, champion: Any) -> dict[str, float]:
    """mAP of both versions on the same queries, and the confidence interval of the difference.

    Args:
        challenger, champion: number and tags of each version.

    Raises:
        ValueError: the versions were trained on different data, the dataset is another one, or it has no labels.
    """
    for tag in SAME:
        if challenger[1].get(tag) != champion[1].get(tag):
            raise ValueError(
                f"version {challenger[0]} has {tag} {challenger[1].get(tag)}, champion {champion[0]} has {champion[1].get(tag)}: "
                "only versions of the same data are compared"
            )
    if config.protocol not in challenger[1]["protocol"].split("+"):
        raise ValueError(f"version {challenger[0]} was not measured under protocol {config.protocol}, but under {challenger[1]['protocol'] or 'none'}")
    root = to_path(config.dataset or challenger[1].get("dataset_path", ""))
    manifest = Manifest.read(root)
    if manifest.digest() != challenger[1]["dataset_digest"]:
        raise ValueError(f"dataset {root} is not the one that the versions belong to: give its folder by --dataset")
    found = [_precisions(uri, config.name, each[0], root, manifest, each[1], config.protocol) for each in (challenger, champion)]
    counts = np.isfinite(found[0])
    if not counts.any():
        raise ValueError(f"no query of protocol {config.protocol} has a label")
    difference = (found[0] - found[1])[counts]
    low, high = interval(difference, config.confidence, config.seed)
    ours, theirs = (float(each[counts].mean()) for each in found)
    return {"challenger": ours, "champion": theirs, "difference": float(difference.mean()), "low": low, "high": high, "queries": int(counts.sum())}


def run(config: Config) -> dict[str, Any]:
    """Promote, or roll back; returns the decision.

    Raises:
        ValueError: there is no challenger, the versions cannot be compared, or another promotion is running.
    """
    uri = config.tracking or default_uri(config.storage)
    with versions.promotion(uri, config.name):
        champion = versions.version_tags(uri, config.name, "champion")
        return _roll_back(uri, config.name, champion) if config.rollback else _promote(uri, config, champion)


def _promote(uri: str, config: Config, champion: Any) -> dict[str, Any]:
    name = config.name
    challenger = versions.version_tags(uri, name, "challenger")
    if challenger is None:
        raise ValueError(f"model {name!r} has no challenger: `hashbridge register RUN --name {name}` makes one")
    decision: dict[str, Any] = {"name": name, "challenger": challenger[0], "champion": champion and champion[0]}
    if champion is None:
        versions.set_champion(uri, name, challenger[0], {"champion_before": "", "decided": _now()})
        print(f"{name}: no champion yet: version {challenger[0]} is the champion now")
        return decision | {"promoted": True}
    if champion[0] == challenger[0]:
        print(f"{name}: version {challenger[0]} is the champion already")
        return decision | {"promoted": False}
    found = compare(uri, config, challenger, champion)
    better = found["low"] > config.margin
    told = {f"promotion.{key}": f"{value:.6g}" for key, value in found.items()}
    told |= {"promotion.protocol": config.protocol, "promotion.against": str(champion[0]), "promotion.promoted": str(better), "decided": _now()}
    if better:
        versions.set_champion(uri, name, challenger[0], told | {"champion_before": str(champion[0])})
    else:
        versions.tag_version(uri, name, challenger[0], told)
    print(
        f"{name}: {config.protocol}/map of challenger {challenger[0]} {found['challenger']:.4f}, of champion {champion[0]} {found['champion']:.4f}; "
        f"difference {found['difference']:+.4f}, {100 * config.confidence:g} % interval {found['low']:+.4f} to {found['high']:+.4f} "
        f"over {found['queries']:,} queries: " + (f"version {challenger[0]} is the champion now" if better else "the champion stays")
    )
    return decision | {"promoted": better, "figures": found}


def _roll_back(uri: str, name: str, champion: Any) -> dict[str, Any]:
    before = champion[1].get("champion_before") if champion else ""
    if not champion or not before:
        raise ValueError(f"model {name!r} has no earlier champion to roll back to")
    versions.set_champion(uri, name, int(before), {"rolled_back_from": str(champion[0]), "decided": _now()})
    print(f"{name}: version {before} is the champion again, in place of {champion[0]}")
    return {"name": name, "champion": int(before), "rolled_back": champion[0], "promoted": False}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
