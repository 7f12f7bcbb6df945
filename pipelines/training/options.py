"""The options of a training run: one typed, checked value that everything after it relies on."""

import dataclasses
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from models.codes import check_bits
from models.registry import METHODS, find_method
from pipelines.console.config import build, flag, option, positional
from pipelines.training import runs

NOT_NEGATIVE = (
    "steps_per_epoch", "least_steps", "checkpoint_steps", "checkpoint_seconds", "workers", "threads", "seed", "cache_mb", "max_failures", "tracking_wait",
)  # fmt: skip


@dataclass
class TrainOptions:
    """Options of ``hashbridge train``; ``own`` holds the method's hyper-parameters by name."""

    method: str = positional("the method: see `hashbridge methods`")
    dataset: str = option("", "folder of the dataset")
    source: str = option("", "the labelled domain; optional for methods that need no labels")
    target: str = option("", "the domain to adapt to; training never reads its labels")
    bits: int = option(64, "code length, a multiple of 8")
    epochs: int = option(10, "passes over the larger domain, of at least --least-steps each")
    steps_per_epoch: int = option(0, "steps of an epoch (default: rows of the larger domain / batch size)")
    least_steps: int = option(100, "fewest steps of an epoch, however small the domains are")
    workers: int = option(1, "Ray Train workers; 0 trains in this process or torchrun group, without Ray")
    threads: int = option(0, "CPU threads of a worker (default: the most that the nodes have for each worker)")
    gpu: bool = option(False, "train on GPUs, one per worker")
    checkpoint_steps: int = option(0, "steps between checkpoints within an epoch (default: only at the end of each epoch)")
    checkpoint_seconds: float = option(0.0, "seconds between checkpoints within an epoch (default: only at the end of each epoch)")
    seed: int = option(0, "seed of all random draws")
    preset: str = option("default", "default: the setting that works best here; paper: the paper's, with its epochs; others: see `hashbridge methods`")
    storage: str = option("runs", "folder of runs and checkpoints, visible to all workers")
    tracking: str = option("", "MLflow tracking URI, or none (default: MLFLOW_TRACKING_URI, else SQLite in the storage folder)")
    tracking_wait: int = option(90, "seconds that a finished run waits for an unreachable tracking server")
    resume: str = option("", "continue this interrupted run")
    cache_mb: int = option(2048, "memory per worker, in MiB, up to which its rows are kept in memory")
    precision: str = option("float32", "bf16: the networks' heavy parts compute in it; losses, codes and batch-norm's moments do not", ("float32", "bf16"))
    compile: bool = option(False, "compile the networks' heavy parts with torch.compile: a minute at the start, faster steps on GPUs")
    profile: bool = option(False, "say how the time of a step divides, and write a trace of some steps beside the run")
    decoders: int = option(-1, "threads of a worker that decode ahead, above four with processes but for stored jpeg; 0: none (default: --threads)")
    max_failures: int = option(3, "restarts of the workers after a crash")
    plots: bool = option(True, "draw plots at the end")
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}, but must be at least 1")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}, but must not be negative")
        check_bits(self.bits)


def method_fields() -> dict[str, list[Field]]:
    """The hyper-parameter fields of each method, by the method's name."""
    return {name: list(fields(method.Config)) for name, method in METHODS.items()}


def make_options(values: dict[str, Any], kind: type[TrainOptions] = TrainOptions) -> Any:
    """Build options from given values, which may include the method's hyper-parameters.

    A resumed run's saved options are the defaults of those not given.

    Args:
        kind: the class of the result, ``TrainOptions`` or a subclass.

    Raises:
        ValueError: a name or value is wrong, or a required one is missing.
    """
    if values.get("resume"):
        folder = runs.find_run(str(values["resume"]), str(values.get("storage", "runs")))
        saved = runs.read_config(folder)
        saved = {k: v for k, v in runs.options(saved).items() if k != "own"} | saved["own"]
        values = saved | values | {"resume": folder.name, "storage": str(folder.parent)}
    if not values.get("method"):
        raise ValueError(f"METHOD is missing: one of {', '.join(METHODS)}")
    method = find_method(str(values["method"]))
    named = {each.name for each in fields(method.Config)}
    common = {name: value for name, value in values.items() if name not in named}
    own = {name: value for name, value in values.items() if name in named}
    others = {each.name for other in METHODS.values() for each in fields(other.Config)} - named
    for name in common:
        if name in others and name not in {each.name for each in fields(kind)}:
            raise ValueError(f"method {method.name} has no field {flag(name)}: see `hashbridge methods`")
    options = build(kind, common)
    preset = method.preset(options.preset)
    checked = asdict(build(method.Config, own))
    options.own = asdict(dataclasses.replace(preset, **{name: checked[name] for name in own}))
    weights = options.own.get("pretrained", "none")
    if weights not in ("default", "none") and Path(weights).exists():
        options.own["pretrained"] = str(Path(weights).resolve())  # Ray's workers have other working folders
    if options.preset in method.presets and "epochs" not in values:
        options.epochs = method.presets[options.preset].epochs or options.epochs
    options.epochs = 1 if method.fitted else options.epochs
    for name in ("dataset", "source", "target"):
        if not getattr(options, name) and not (name == "source" and method.source_optional):
            raise ValueError(f"{flag(name)} is missing: {TrainOptions.__dataclass_fields__[name].metadata['help']}")
    return options
