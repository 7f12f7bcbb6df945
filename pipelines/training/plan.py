"""The plan of a training run: everything that follows from its options and its dataset before the first step."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.filesystem import to_path
from data.manifest import Manifest, Split
from models.method import Method
from models.registry import find_method
from pipelines.training.options import TrainOptions


@dataclass(frozen=True)
class Setup:
    """What a process needs to train with some options, made once and passed on.

    Attributes:
        root: the dataset's folder.
        method: with freshly initialised networks.
    """

    options: TrainOptions
    root: Path
    manifest: Manifest
    method: Method


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that are fixed before its first step; picklable, so that workers receive it.

    Attributes:
        options: with the dataset's absolute path.
        folder: the run's folder, absolute; "" while there is none.
        batch: rows per domain in a global batch.
        steps: steps of an epoch; 0 for a fitted method.
        rows: training rows of the larger domain.
        threads: CPU threads of a worker.
        decoders: decoding threads of a worker.
    """

    options: TrainOptions
    folder: str
    batch: int
    steps: int
    rows: int
    threads: int
    decoders: int


def prepare(options: TrainOptions) -> Setup:
    """Read the dataset's manifest and build the method, its networks drawn from the seed.

    Raises:
        ValueError: there is no such dataset, or the method does not take its rows.
    """
    root = to_path(options.dataset)
    manifest = Manifest.read(root)
    kind = find_method(options.method)
    torch.manual_seed(options.seed)
    return Setup(options, root, manifest, kind(kind.Config(**options.own), tuple(manifest.shape), len(manifest.classes), options.bits))


def make_plan(setup: Setup, cores: Callable[[], int]) -> Plan:
    """Check that the method can train on these domains, and fix batch size, steps and threads.

    Args:
        cores: CPU cores that all workers share; only called if ``threads`` is not given, and after all checks.

    Raises:
        ValueError: it cannot; says why and what to do.
    """
    options, manifest, method = setup.options, setup.manifest, setup.method
    source = manifest.split(options.source, "train") if options.source else None
    target = manifest.split(options.target, "train")
    if method.wants.target and options.source == options.target:
        hint = ": leave --source out" if method.source_optional else ""
        raise ValueError(f"{options.method} learns from two domains, but source and target are both {options.source!r}{hint}")
    world = options.workers or int(os.environ.get("WORLD_SIZE", 1))
    if method.fitted and world > 1:
        raise ValueError(f"{options.method} is fitted in one process, not trained by {world} workers: give --workers 1")
    batch = _batch_size(method, _labelled_classes(setup, source) if source else 0, world)
    rows = max(split.rows for split in (source, target if method.wants.target else None) if split)
    steps = 0 if method.fitted else options.steps_per_epoch or max(options.least_steps, rows // batch, 1)
    threads = options.threads or max(1, cores() // (world if options.workers else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    decoders = options.decoders if options.decoders >= 0 else threads
    return Plan(replace(options, dataset=str(setup.root.resolve()), threads=threads), "", batch, steps, rows, threads, decoders)


def _labelled_classes(setup: Setup, source: Split) -> int:
    """Number of classes that the source has rows of."""
    options, wants = setup.options, setup.method.wants
    present = sum(1 for count in source.labels if count)
    if wants.source_labels and not present:
        raise ValueError(f"source {options.source!r} has no labels, and {options.method} needs them: swap the domains or label it")
    empty = [name for name, count in zip(setup.manifest.classes, source.labels, strict=True) if not count]
    if wants.source_labels and empty:
        print(f"note: source {options.source!r} has no row of class {', '.join(empty[:5])}", file=sys.stderr)
    return present


def _batch_size(method: Method, classes: int, world: int) -> int:
    """Rows per domain in a global batch."""
    wants = method.wants
    if wants.per_class and wants.per_class % world:
        near = -(-wants.per_class // world) * world
        raise ValueError(f"{wants.per_class} rows of each class do not divide over {world} workers: give --per-class {near}")
    batch = wants.batch_size or wants.per_class * classes
    if batch < 2 * world:
        raise ValueError(f"a batch of {batch} rows is too small for {world} workers: a worker needs at least 2")
    if batch % world:
        raise ValueError(f"a batch of {batch} rows does not divide over {world} workers")
    return batch
