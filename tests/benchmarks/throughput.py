"""Training throughput: the bare loop on tensors in memory, ``hashbridge train`` with one Ray worker, and with two.

Run: python -m tests.benchmarks.throughput [--method dah] [--epochs 6] [--steps 20] [--per-class 20] [--rounds 4]
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import DomainLoader
from data.manifest import Manifest
from data.rows import DomainBatch
from data.transforms import random_view
from models.method import Batch
from models.registry import METHODS, find_method
from pipelines import ingest, train
from pipelines.console.cli import set_default_environment


def bare_loop(config: train.Config, threads: int) -> float:
    """Images per second, the median epoch's after the first, of a method's steps on tensors that lie in memory: no Ray, no files, no checkpoints."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    root = Path(config.dataset)
    manifest = Manifest.read(root)
    kind = find_method(config.method)
    method = kind(kind.Config(**config.own), tuple(manifest.shape), len(manifest.classes), config.bits).train()
    wants = method.wants
    sources = [DomainLoader(root, manifest, domain, "train", 1, labels=True) for domain in (config.source, config.target)[: 1 + wants.target]]
    rows = [source.cached_rows() for source in sources]
    method.begin(sources[0], sources[1] if wants.target else None)
    size = wants.batch_size or wants.per_class * len(manifest.classes)
    speeds = []
    for epoch in range(config.epochs):
        method.begin_epoch(epoch, config.epochs)
        start, images = time.perf_counter(), 0
        for step in range(config.steps_per_epoch):
            parts: list[DomainBatch] = []
            for each in rows:
                drawn = each.take(np.random.default_rng(step).integers(len(each.row), size=size))
                generator = torch.Generator().manual_seed(step)
                views = tuple(random_view(drawn.x, generator, **wants.view) for _ in range(wants.views))
                parts.append(DomainBatch(drawn.x, views, drawn.label, drawn.row))
            method.begin_step((epoch + step / config.steps_per_epoch) / config.epochs)
            for name in filter(method.is_active, method.players):
                optimizer = method.players[name].optimizer
                optimizer.zero_grad(set_to_none=True)
                method.loss(name, Batch(parts[0], parts[1] if wants.target else None))[0].backward()
                optimizer.step()
            method.end_step()
            images += sum(len(part.x) for part in parts)
        speeds.append(images / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


def trained(config: train.Config) -> float:
    """Images per second of ``hashbridge train``, the median epoch's after the first."""
    with contextlib.redirect_stdout(sys.stderr):
        result = train.run(config)
    lines = (Path(config.storage) / result["run_id"] / "progress.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_second"] for line in lines[1:])


def main() -> None:
    """Print images per second of each way, and the ratios, each taken between two bare loops: machines drift."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="dah", choices=[*METHODS], help="one that is trained in steps")
    for name, default in {"epochs": 6, "steps": 20, "per-class": 20, "rounds": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    set_default_environment()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "digits"
        ingest.run(ingest.Config("digits", dataset=str(dataset)))

        def config(**more: Any) -> train.Config:
            small = {"per_class": given.per_class} if hasattr(find_method(given.method).Config, "per_class") else {}
            return train.make_config({
                "method": given.method, "dataset": str(dataset), "source": "typeset", "target": "handwritten", "epochs": given.epochs,
                "steps_per_epoch": given.steps, "storage": f"{folder}/runs", "tracking": "none", "plots": False,
            } | small | more)  # fmt: skip

        bare = [bare_loop(config(), cores)]
        rounds: dict[str, list[tuple[float, float]]] = {"one worker": [], "two workers": []}
        for _ in range(given.rounds):
            for name, more in {"one worker": {"threads": cores}, "two workers": {"workers": 2, "threads": max(1, cores // 2)}}.items():
                speed = trained(config(**more))
                bare.append(bare_loop(config(), cores))
                rounds[name].append((speed, 2 * speed / (bare[-2] + bare[-1])))
    print(f"\n{given.method}, {cores} cores, images of both domains per second; ratio to the mean of the bare loops before and after")
    print(f"bare loop   {statistics.median(bare):>7,.0f}   of {', '.join(f'{x:,.0f}' for x in bare)}")
    for name, each in rounds.items():
        speeds, ratios = zip(*each, strict=True)
        print(f"{name:<12}{statistics.median(speeds):>7,.0f}   ratio {statistics.median(ratios):.2f} of {', '.join(f'{x:.2f}' for x in ratios)}")


if __name__ == "__main__":
    main()
