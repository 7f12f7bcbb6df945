"""What follows from a training's options and its dataset before the first step: batches, steps, threads."""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.manifest import Manifest, Split
from models.method import Wants
from models.registry import find


@dataclass(frozen=True)
class Plan:
    """What follows from a config and the manifest before the first step: batches, steps, what each worker does."""

    config: dict[str, Any]
    folder: str
    batch: int
    steps: int
    threads: int


def make_plan(config: Any, manifest: Manifest, folder: Path, cores: int) -> Plan:
    """Check that a method can train on these domains, and fix the numbers of its steps.

    Args:
        config: a :class:`pipelines.train.Config`.

    Raises:
        ValueError: it cannot; says why and what to do.
    """
    kind = find(config.method)
    method = kind(kind.Config(**config.own), tuple(manifest.shape), len(manifest.classes), config.bits)
    wants = method.wants
    source = manifest.split(config.source, "train") if config.source else None
    target = manifest.split(config.target, "train")
    if wants.target and config.source == config.target:
        hint = ": leave --source out" if method.one_domain else ""
        raise ValueError(f"{config.method} learns from two domains, but source and target are both {config.source!r}{hint}")
    world = max(config.workers, 1) if config.workers else int(os.environ.get("WORLD_SIZE", 1))
    if method.fitted and world > 1:
        raise ValueError(f"{config.method} is fitted in one process, not trained by {world} workers: give --workers 1")
    present = _labelled_classes(config, wants, manifest, source) if source else 0
    batch = _batch(wants, present, world)
    rows = max(split.rows for split in (source, target if wants.target else None) if split)
    steps = config.steps_per_epoch or max(100, rows // batch)
    threads = config.threads or max(1, cores // (world if config.workers else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return Plan(asdict(config), str(folder), batch, 0 if method.fitted else steps, threads)


def _labelled_classes(config: Any, wants: Wants, manifest: Manifest, source: Split) -> int:
    """Number of classes that the source has rows of."""
    present = sum(1 for count in source.labels if count)
    if wants.source_labels and not present:
        raise ValueError(f"source {config.source!r} has no labels, and {config.method} needs them: swap the domains or label it")
    empty = [name for name, count in zip(manifest.classes, source.labels, strict=True) if not count]
    if wants.source_labels and empty:
        print(f"note: source {config.source!r} has no row of class {', '.join(empty[:5])}", file=sys.stderr)
    return present


def _batch(wants: Wants, classes: int, world: int) -> int:
    """Rows of a domain in a global batch."""
    if wants.per_class and wants.per_class % world:
        near = -(-wants.per_class // world) * world
        raise ValueError(f"{wants.per_class} rows of each class do not divide over {world} workers: give --per-class {near}")
    batch = wants.batch_size or wants.per_class * classes
    if batch < 2 * world:
        raise ValueError(f"a batch of {batch} rows is too small for {world} workers: a worker needs at least 2")
    if batch % world:
        raise ValueError(f"a batch of {batch} rows does not divide over {world} workers")
    return batch
