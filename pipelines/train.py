"""Command: train a method on a source and a target, evaluate it, and track the run.

The way of a run: options -> plan -> launch -> conclude.
"""

import dataclasses
import os
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.filesystem import to_path
from models.distributed import broadcast_from_rank_0
from pipelines.console import cluster
from pipelines.retrieval import evaluation
from pipelines.training import checkpoint, runs
from pipelines.training.launch import launch, loaders, train
from pipelines.training.options import TrainOptions, make_options, method_fields
from pipelines.training.plan import Plan, Setup, make_plan, prepare
from pipelines.training.reporting import Reporter, open_tracker, tracking_uri
from pipelines.training.restore import device_for

Config = TrainOptions
make_config = make_options

__all__ = ["Config", "make_config", "method_fields", "run"]


def run(options: TrainOptions) -> dict[str, Any]:
    """Train, evaluate and track; returns the run's result.

    Under torchrun (``--workers 0``) rank 0 does this; the other ranks receive its plan, train, and return nothing.
    """
    if options.workers or "RANK" not in os.environ:
        return _run(options)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.gpu else "gloo")
    try:
        if dist.get_rank() == 0:
            return _run(options)
        try:
            plan = broadcast_from_rank_0({})["plan"]
        except RuntimeError as error:
            raise ValueError("rank 0 ended before training began; its message says why") from error
        train(plan)
        return {}
    finally:
        dist.destroy_process_group()


def describe(plan: Plan) -> str:
    """The size of a training; says when an epoch is more than a pass."""
    if not plan.steps:
        return "fitted at once"
    passes = f", {plan.steps * plan.batch / plan.rows:.3g} passes over the larger domain each" if plan.steps * plan.batch > plan.rows else ""
    return f"{plan.options.epochs} epochs of {plan.steps} steps of {plan.batch} rows a domain{passes}"


def _run(options: TrainOptions) -> dict[str, Any]:
    if not options.workers:
        device_for(options.gpu)
    setup = prepare(options)
    plan = make_plan(setup, lambda: _cores(options))
    for note in setup.method.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.precision == "bf16" and not options.gpu:
        print("note: --precision bf16 is for GPUs: most CPUs compute it several times slower than float32", file=sys.stderr)
    tracking_uri(options)
    folder = _open_folder(options)
    plan = dataclasses.replace(plan, folder=str(folder.resolve()))
    tracked = _check_dataset(folder, setup)["tracked"] if options.resume else ""
    tracker = open_tracker(plan.options, folder, setup.manifest, tracked)
    runs.record(folder, asdict(plan.options), setup.manifest, tracker.tracked if tracker else "")
    print(f"run {folder.name}: {describe(plan)}", file=sys.stderr, flush=True)
    if setup.manifest.compressed and plan.steps:
        for loader in filter(None, loaders(plan, setup, 0, options.workers or int(os.environ.get("WORLD_SIZE", 1)))):
            print(f"{loader.memory}{' a worker' if options.workers > 1 else ''}", file=sys.stderr, flush=True)
    reporter = Reporter(options, folder, tracker)
    try:
        with runs.Follower(folder, reporter.epoch):
            launch(plan, setup)
        result = conclude(plan, setup, folder, reporter.seconds)
    except BaseException:
        reporter.fail()
        raise
    reporter.finish(result["metrics"])
    return result


def _cores(options: TrainOptions) -> int:
    """CPU cores that the workers share: those of the cluster's nodes that each can have, or this machine's."""
    if not options.workers:
        return len(os.sched_getaffinity(0))
    cluster.connect()
    return options.workers * cluster.threads_each(options.workers, options.gpu)


def _open_folder(options: TrainOptions) -> Path:
    """The run's folder: a new one, or the one to resume.

    Raises:
        ValueError: the run to resume has another method or code length.
    """
    if options.resume:
        folder = to_path(options.storage) / options.resume
        _check_resumed(options, folder)
        return folder
    named = [each for each in (options.method, options.source, options.target) if each]
    folder = to_path(options.storage) / "-".join([*named, str(options.bits), uuid.uuid4().hex[:6]]).replace(" ", "_")
    folder.mkdir(parents=True)
    return folder


def _check_resumed(options: TrainOptions, folder: Path) -> None:
    latest = checkpoint.latest(folder / "checkpoints")
    if latest is None:
        return
    state = checkpoint.read_state(latest)
    if state["method"] != options.method or state["bits"] != options.bits:
        raise ValueError(
            f"run {folder.name} is of {state['method']} with {state['bits']} bits, not of {options.method} with {options.bits}: "
            "leave these options out to resume it, or start a new run"
        )


def _check_dataset(folder: Path, setup: Setup) -> dict[str, Any]:
    """The record of a run to resume.

    Raises:
        ValueError: its dataset has changed since it began.
    """
    saved = runs.read_config(folder)
    if saved.get("dataset_digest", setup.manifest.digest()) != setup.manifest.digest():
        raise ValueError(f"dataset {setup.root} has changed since run {folder.name} began: start a new run")
    return saved


def conclude(plan: Plan, setup: Setup, folder: Path, seconds: float) -> dict[str, Any]:
    """Evaluate the last epoch, write the run's result and show it."""
    options = plan.options
    evaluated = evaluation.evaluate_run(folder, setup.root, setup.manifest, plots=options.plots, gpu=options.gpu and torch.cuda.is_available())
    lines = runs.read_progress(folder)
    speeds = [line["images_per_second"] for line in lines[1:] or lines]
    oracle = options.source == options.target
    result = {
        "run_id": folder.name, "method": options.method, "source": options.source, "target": options.target, "bits": options.bits,
        "seed": options.seed, "epochs": options.epochs, "workers": options.workers, "seconds": seconds,
        "images_per_second": sorted(speeds)[len(speeds) // 2], "oracle": oracle, "dataset": setup.manifest.digest(),
        "metrics": evaluated["metrics"], "notes": evaluated["notes"],
        "checkpoint": str(checkpoint.latest(folder / "checkpoints")),
    }  # fmt: skip
    runs.write_json(folder / "result.json", result)
    evaluation.print_metrics(evaluated["metrics"], evaluated["notes"], oracle)
    print(f"run {folder.name}: {seconds:.0f} s" + (f"; plots in {folder / 'plots'}" if options.plots else ""))
    return result
