"""Stage: train a method on a source and a target, evaluate it, and track the run."""

import dataclasses
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from data.manifest import Manifest
from data.places import path_of, remove, write_text
from models.codes import check_bits
from models.registry import METHODS, find
from pipelines import checkpoint, cluster, evaluate, runs
from pipelines.config import build, option, positional
from pipelines.outbox import Outbox, patiently
from pipelines.plan import Plan, make_plan

STREAMS = {"source": 0, "target": 1}
FAILURE = "failure.txt"  # in a run's folder: why its training diverged


@dataclass
class Config:
    """Options of ``hashbridge train``."""

    method: str = positional("the method: see `hashbridge methods`")
    dataset: str = option("", "folder of the dataset")
    source: str = option("", "the labelled domain; without labels for a method that needs none")
    target: str = option("", "the domain to adapt to, whose labels are never read in training")
    bits: int = option(64, "code length, a multiple of 8")
    epochs: int = option(10, "passes over the larger domain, of at least 100 steps each")
    steps_per_epoch: int = option(0, "steps of an epoch (default: larger domain / batch, at least 100)")
    workers: int = option(1, "Ray Train workers; 0 for this process or the torchrun group, without Ray")
    threads: int = option(0, "CPU threads of a worker (default: the cores over the workers)")
    gpu: bool = option(False, "train on GPUs, one a worker")
    checkpoint_steps: int = option(0, "steps between two checkpoints within an epoch (default: one at each epoch's end alone)")
    checkpoint_seconds: float = option(0.0, "seconds after which another checkpoint is written within an epoch")
    seed: int = option(0, "seed of everything drawn")
    preset: str = option("default", "default: what works best here; paper: the paper's own setting", ("default", "paper"))
    storage: str = option("runs", "folder of runs and checkpoints, seen by all workers")
    tracking: str = option("", "MLflow's tracking URI, or none (default: MLFLOW_TRACKING_URI, else SQLite in the storage)")
    tracking_wait: int = option(90, "seconds that a run which has ended waits for a tracking server that is away")
    resume: str = option("", "go on with a run that ended before its last epoch")
    cache_mb: int = option(2048, "memory of a worker, in MiB, up to which its rows are held")
    max_failures: int = option(3, "restarts of the workers after a crash")
    plots: bool = option(True, "draw plots at the end")
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}, but must be at least 1")
        for name in ("steps_per_epoch", "checkpoint_steps", "checkpoint_seconds", "workers", "threads", "seed", "cache_mb", "max_failures", "tracking_wait"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must not be negative")
        check_bits(self.bits)


def method_fields(argv: list[str]) -> list[Field]:
    """The fields of the method that the command line names; of all where it names none."""
    named = [METHODS[each] for each in argv if each in METHODS] or [*METHODS.values()]
    return list({each.name: each for method in named for each in fields(method.Config)}.values())


def make_config(values: dict[str, Any], kind: type[Config] = Config) -> Any:
    """A config of a kind from the given values, the method's own among them; a resumed run's own config under them.

    Raises:
        ValueError: a name or a value is wrong, or a needed one is missing.
    """
    if values.get("resume"):
        folder = runs.find_run(str(values["resume"]), str(values.get("storage", "runs")))
        saved = runs.read_config(folder)
        saved = {k: v for k, v in saved.items() if k not in ("own", "tracked")} | saved["own"]
        values = saved | values | {"resume": folder.name, "storage": str(folder.parent)}
    if not values.get("method"):
        raise ValueError(f"METHOD is missing: one of {', '.join(METHODS)}")
    method = find(str(values["method"]))
    named = {each.name for each in fields(method.Config)}
    plain = {name: value for name, value in values.items() if name not in named}
    own = {name: value for name, value in values.items() if name in named}
    others = {each.name for other in METHODS.values() for each in fields(other.Config)} - named
    for name in plain:
        if name in others and name not in {each.name for each in fields(kind)}:
            raise ValueError(f"method {method.name} has no field --{name.replace('_', '-')}: see `hashbridge methods`")
    config = build(kind, plain)
    preset = method.Config.paper() if config.preset == "paper" else method.Config()
    config.own = asdict(dataclasses.replace(preset, **asdict_checked(method.Config, own)))
    config.epochs = 1 if method.fitted else config.epochs
    for name in ("dataset", "source", "target"):
        if not getattr(config, name) and not (name == "source" and method.one_domain):
            raise ValueError(f"--{name} is missing: {Config.__dataclass_fields__[name].metadata['help']}")
    return config


def asdict_checked(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Given values of a method's fields, converted and checked; those that are not given stay out."""
    whole = asdict(build(kind, values))
    return {name: whole[name] for name in values}


def work(plan: dict[str, Any], listen: Callable[[dict[str, Any], Any], None] | None = None, held: dict[str, Any] | None = None) -> None:
    """Train in this process: alone, as a rank of torchrun, or as a worker of Ray Train.

    Args:
        listen: takes the record of each finished epoch, and the method, on rank 0.
        held: the rows (:class:`data.batches.Rows`) of ``source`` and ``target``, where a process that trains alone need not read them.
    """
    import torch  # noqa: PLC0415

    from data.batches import DomainSource  # noqa: PLC0415
    from models.distributed import rank, world_size  # noqa: PLC0415
    from pipelines.loop import Trainer  # noqa: PLC0415

    p = Plan(**plan)
    config, folder, root = Config(**p.config), path_of(p.folder), path_of(p.config["dataset"])
    torch.set_num_threads(p.threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if config.gpu else torch.device("cpu")
    manifest = Manifest.read(root)
    kind = find(config.method)
    torch.manual_seed(config.seed)
    method = kind(kind.Config(**config.own), tuple(manifest.shape), len(manifest.classes), config.bits)
    wants, world = method.wants, world_size()

    def batches(domain: str, role: str, labels: bool, per_class: int) -> DomainSource:
        return DomainSource(
            root, manifest, domain, "train", p.batch // world, per_class // world, labels, wants.views, wants.view,
            config.seed, rank(), world, config.cache_mb, STREAMS[role], (held or {}).get(role),
        )  # fmt: skip

    source = batches(config.source, "source", wants.source_labels, wants.per_class) if config.source else None
    target = batches(config.target, "target", False, 0) if wants.target else None
    progress = runs.Progress(folder)
    drawn = _with_pictures(progress, method, manifest, config, folder) if rank() == 0 else progress

    def report(record: dict[str, Any]) -> None:
        drawn(record)
        if listen:
            listen(record, method)

    places = folder / "checkpoints"
    Trainer(
        method, source, target, config.epochs, p.steps, config.seed, places, p.config, report, device, config.checkpoint_steps, config.checkpoint_seconds
    ).fit()


def _with_pictures(progress: runs.Progress, method: Any, manifest: Manifest, config: Config, folder: Path) -> Callable[[dict[str, Any]], None]:
    """A reporter that also draws what a method translates source images into after each epoch, where it makes images."""
    if not (config.plots and method.generates and manifest.store != "feature"):
        return progress
    from pipelines.translate import Sampler  # noqa: PLC0415

    draw = Sampler(method, path_of(config.dataset), manifest, config.source, folder / "plots")
    return lambda record: progress(record | {"picture": str(draw(record["epoch"]))})


def work_once(plan: dict[str, Any]) -> None:
    """:func:`work` on a worker of Ray Train, which would try again what failed: a training that diverges does so each time."""
    failure = path_of(plan["folder"]) / FAILURE
    try:
        work(plan)
    except FloatingPointError as error:
        write_text(failure, str(error))


def launch(plan: Plan, workers: int, gpu: bool, failures: int) -> None:
    """Run the plan's work: here, with torchrun's other ranks, or on Ray Train's workers."""
    if not workers:
        from models.distributed import share  # noqa: PLC0415  torch is slow to import

        work(share(asdict(plan)))
        return
    ray = cluster.start()
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    total = ray.cluster_resources()
    wanted = {"GPU": workers} if gpu else {"CPU": workers * plan.threads}
    for name, count in wanted.items():
        if total.get(name, 0) < count:
            raise ValueError(f"{workers} workers need {count} {name}s, but the cluster has {total.get(name, 0):g}: fewer --workers or --threads")
    folder = path_of(plan.folder)
    trainer = TorchTrainer(
        work_once,
        train_loop_config=asdict(plan),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=None if gpu else {"CPU": plan.threads}),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}", **cluster.storage(folder / "ray"),
            failure_config=FailureConfig(max_failures=failures),
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


def _new_run(config: Config) -> Path:
    named = [each for each in (config.method, config.source, config.target) if each]
    name = "-".join([*named, str(config.bits), uuid.uuid4().hex[:6]]).replace(" ", "_")
    folder = path_of(config.storage) / name
    folder.mkdir(parents=True)
    return folder


def _check_resumed(config: Config, folder: Path) -> None:
    place = checkpoint.latest(folder / "checkpoints")
    if place is None:
        return
    state = checkpoint.read_state(place)
    if state["method"] != config.method or state["bits"] != config.bits:
        raise ValueError(
            f"run {folder.name} is of {state['method']} with {state['bits']} bits, not of {config.method} with {config.bits}: "
            "leave these out to resume it, or start a new run"
        )


def run(config: Config) -> dict[str, Any]:
    """Train, evaluate and track; returns the run's result.

    Under torchrun (``--workers 0``) rank 0 does so, and the other ranks take its plan, train with it and return nothing.
    """
    if config.workers or "RANK" not in os.environ:
        return _run(config)
    import torch.distributed as dist  # noqa: PLC0415

    from models.distributed import share  # noqa: PLC0415

    dist.init_process_group("cpu:gloo,cuda:nccl" if config.gpu else "gloo")
    try:
        if dist.get_rank() == 0:
            return _run(config)
        try:
            plan = share({})
        except RuntimeError as error:
            raise ValueError("rank 0 ended before training began, and says why") from error
        work(plan)
        return {}
    finally:
        dist.destroy_process_group()


def _run(config: Config) -> dict[str, Any]:
    root = path_of(config.dataset)
    manifest = Manifest.read(root)
    method = find(config.method)
    method(method.Config(**config.own), tuple(manifest.shape), len(manifest.classes), config.bits)
    cores = len(os.sched_getaffinity(0))
    if config.workers and not config.gpu:
        cores = int(cluster.start().cluster_resources().get("CPU", cores))
    plan = make_plan(config, manifest, Path(), cores)
    folder = path_of(config.storage) / config.resume if config.resume else _new_run(config)
    if config.resume:
        _check_resumed(config, folder)
    config = dataclasses.replace(config, threads=plan.threads)
    plan = dataclasses.replace(plan, folder=str(folder.resolve()), config=asdict(config) | {"dataset": str(root.resolve())})
    saved = runs.read_config(folder)["tracked"] if config.resume else ""
    tracker = open_tracker(config, folder, manifest, saved)
    runs.write_json(folder / "config.json", plan.config | {"tracked": tracker.tracked if tracker else ""})
    started, done, outbox = time.monotonic(), 0, Outbox()

    def listen(record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        print(runs.show(record | {"done_here": done}, started), file=sys.stderr, flush=True)
        if tracker:
            outbox(partial(tracker.epoch, record))

    size = f"{config.epochs} epochs of {plan.steps} steps of {plan.batch} rows a domain" if plan.steps else "fitted at once"
    print(f"run {folder.name}: {size}", file=sys.stderr, flush=True)
    try:
        with runs.Follower(folder, listen):
            launch(plan, config.workers, config.gpu, config.max_failures)
        result = conclude(config, manifest, folder, time.monotonic() - started)
    except BaseException:
        outbox.close(0 if tracker is None else 5)
        if tracker:
            tracker.fail()
        raise
    sent = outbox.close(config.tracking_wait)
    if tracker and not (sent and patiently(partial(tracker.finish, result["metrics"], folder), config.tracking_wait)):
        tracker.fail()
        print(f"note: run {folder.name} is not wholly tracked: `hashbridge sync {folder.name} --storage {config.storage}` sends it", file=sys.stderr)
    return result


def open_tracker(config: Config, folder: Path, manifest: Manifest, tracked: str) -> Any:
    """What sends a run's record to MLflow; None where nothing is tracked. A new run's parameters are sent.

    Args:
        tracked: MLflow's id of a run to go on with; "" for a new one.

    Raises:
        ValueError: the server does not answer; the folder of a run that has not begun is removed.
    """
    if config.tracking == "none":
        return None
    from pipelines.tracking import Tracker, default_uri  # noqa: PLC0415  mlflow is slow to import

    tracker = None
    try:
        tracker = Tracker(config.tracking or default_uri(config.storage), folder.name, tracked)
        if not tracked:
            shared = {k: v for k, v in asdict(config).items() if k not in ("own", "resume", "tracking")} | config.own
            rows = sum(manifest.split(domain, "train").rows for domain in {config.source, config.target} - {""})
            tracker.start(shared, {"name": manifest.dataset, "digest": manifest.digest(), "path": str(path_of(config.dataset).resolve())}, rows)
    except ValueError:
        if tracker:
            tracker.fail()
        if not (folder / "config.json").exists():
            remove(folder)
        raise
    return tracker


def conclude(config: Config, manifest: Manifest, folder: Path, seconds: float) -> dict[str, Any]:
    """Evaluate the last epoch and write the run's result."""
    evaluated = evaluate.evaluate_run(folder, path_of(config.dataset), manifest, plots=config.plots)
    lines = runs.read_progress(folder)
    speeds = [line["images_per_second"] for line in lines[1:] or lines]
    oracle = config.source == config.target
    result = {
        "run_id": folder.name, "method": config.method, "source": config.source, "target": config.target, "bits": config.bits,
        "seed": config.seed, "epochs": config.epochs, "workers": config.workers, "seconds": seconds,
        "images_per_second": sorted(speeds)[len(speeds) // 2], "oracle": oracle, "dataset": manifest.digest(),
        "metrics": evaluated["metrics"], "notes": evaluated["notes"],
        "checkpoint": str(checkpoint.latest(folder / "checkpoints")),
    }  # fmt: skip
    runs.write_json(folder / "result.json", result)
    evaluate.show(evaluated["metrics"], evaluated["notes"], oracle)
    print(f"run {folder.name}: {seconds:.0f} s; plots in {folder / 'plots'}")
    return result
