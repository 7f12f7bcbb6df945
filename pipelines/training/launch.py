"""Runs a plan: in this process, as one rank of torchrun, or on Ray Train's workers."""

import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.batches import DomainLoader
from data.filesystem import remove, to_path, write_text
from data.rows import Rows
from models.allocator import keep_freed_memory
from models.distributed import broadcast_from_rank_0, rank, world_size
from models.networks.precision import compile_heavy, set_precision
from pipelines.console import cluster
from pipelines.training import runs
from pipelines.training.loop import Trainer
from pipelines.training.options import TrainOptions
from pipelines.training.plan import Plan, Setup, prepare
from pipelines.training.restore import device_for

STREAMS = {"source": 0, "target": 1}
FAILURE = "failure.txt"  # in the run's folder: why the run diverged
Listener = Callable[[dict[str, Any], Any], None]


def launch(plan: Plan, setup: Setup) -> None:
    """Train in this process and torchrun's other ranks (``--workers 0``), or on Ray Train's workers."""
    if plan.options.workers:
        _launch_on_ray(plan)
    else:
        broadcast_from_rank_0({"plan": plan})
        train(plan, setup)


def train(plan: Plan, setup: Setup | None = None, listen: Listener | None = None, held: dict[str, Rows] | None = None) -> None:
    """Train in this process: alone, as a rank of torchrun, or as a worker of Ray Train.

    Args:
        setup: of this process, if it has one already.
        listen: called on rank 0 with the record of each finished epoch, and the method.
        held: the rows of ``source`` and ``target``, if they are in memory already.
    """
    options = plan.options
    torch.set_num_threads(plan.threads)
    keep_freed_memory()
    device = device_for(options.gpu)
    if options.gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        deterministic(True)
    setup = setup or prepare(options)
    method, folder = setup.method, to_path(plan.folder)
    networks = method.state_modules()
    set_precision(networks, options.precision)
    if options.compile:
        compile_heavy(networks)
    source, target = loaders(plan, setup, rank(), world_size(), held)
    progress = runs.ProgressWriter(folder)
    write = _with_pictures(progress, setup, folder) if rank() == 0 else progress

    def report(record: dict[str, Any]) -> None:
        write(record)
        if listen:
            listen(record, method)

    Trainer(
        method, source, target, options.epochs, plan.steps, options.seed, folder / "checkpoints", asdict(options), report, device,
        options.checkpoint_steps, options.checkpoint_seconds, profile=options.profile,
    ).fit()  # fmt: skip


def deterministic(on: bool) -> None:
    """Let a GPU compute the same numbers each time, so that a run that resumes ends as one that nothing disturbed; call it before the GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def loaders(plan: Plan, setup: Setup, rank: int, world: int, held: dict[str, Rows] | None = None) -> tuple[DomainLoader | None, DomainLoader | None]:
    """A worker's loaders of the source's and the target's training split; None for a domain that the method does not use."""
    options, wants = plan.options, setup.method.wants

    def loader(role: str, labels: bool, per_class: int) -> DomainLoader:
        return DomainLoader(
            setup.root, setup.manifest, getattr(options, role), "train", plan.batch // world, per_class // world, labels, wants.views, wants.view,
            options.seed, rank, world, options.cache_mb, STREAMS[role], (held or {}).get(role), plan.decoders, options.gpu,
        )  # fmt: skip

    source = loader("source", wants.source_labels, wants.per_class) if options.source else None
    return source, loader("target", False, 0) if wants.target else None


def _with_pictures(progress: runs.ProgressWriter, setup: Setup, folder: Path) -> Callable[[dict[str, Any]], None]:
    """For a method that generates images: a reporter that also draws translations of source images after each epoch."""
    if not (setup.options.plots and setup.method.can_translate and setup.manifest.store != "feature"):
        return progress
    from pipelines.retrieval.translations import Sampler  # noqa: PLC0415  matplotlib is slow to import

    draw = Sampler(setup.method, setup.root, setup.manifest, setup.options.source, folder / "plots")
    return lambda record: progress(record | {"picture": str(draw(record["epoch"]))})


def _train_on_worker(given: dict[str, Any]) -> None:
    """Run ``train`` on a Ray Train worker. A diverged run is recorded, not raised: Ray would restart it, and it would diverge again."""
    plan = Plan(**given | {"options": TrainOptions(**given["options"])})
    try:
        train(plan)
    except FloatingPointError as error:
        write_text(to_path(plan.folder) / FAILURE, str(error))


def _launch_on_ray(plan: Plan) -> None:
    cluster.connect()
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415  ray is slow to import
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    options, workers = plan.options, plan.options.workers
    name, each = ("GPU", 1) if options.gpu else ("CPU", plan.threads)
    if cluster.room(name, each) < workers:
        nodes = ", ".join(f"{there:g}" for there in cluster.resources(name))
        raise ValueError(f"{workers} workers need {each} {name}s each, but the cluster's nodes have {nodes}: fewer --workers or --threads")
    folder = to_path(plan.folder)
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config=asdict(plan),  # plain values: Ray's controller would import torch to read a Plan
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=options.gpu, resources_per_worker=None if options.gpu else {"CPU": plan.threads}
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}", **cluster.storage_options(folder / "ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )  # fmt: skip
    failure = folder / FAILURE
    failure.unlink(missing_ok=True)
    try:
        trainer.fit()
    except Exception as error:
        raise cluster.user_error(error) from error
    finally:
        remove(folder / "ray")
    if failure.exists():
        raise FloatingPointError(failure.read_text())
