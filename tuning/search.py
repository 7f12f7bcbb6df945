"""Command: search a method's hyper-parameters with Ray Tune and Optuna, by an objective that uses no target labels."""

import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data.filesystem import remove, to_path
from data.manifest import Manifest
from models.registry import find_method
from pipelines.console import cluster
from pipelines.console.config import build, flag, option, read_yaml
from pipelines.registry.connection import default_uri
from pipelines.training import runs
from pipelines.training.options import TrainOptions, make_options, method_fields
from pipelines.training.plan import make_plan, prepare
from tuning import report
from tuning.confirm import confirm
from tuning.explain import Explain, explain
from tuning.objectives import OBJECTIVES, ORACLES, default_objective, maximised
from tuning.pausing import FEWEST, Pauses, Pausing
from tuning.space import RESERVED, Space, space_of
from tuning.start import first_trials
from tuning.study import START, START_UP, KeptActors, ProgressCallback, TuneSearch, cut_off, open_study, recover, sparing, study_in
from tuning.trial import SearchContext, trial

SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random")
DEFAULT = "default: information, or source-map, balance or rank, as method and source allow"
REDUCTION = 3  # of so many trials that have come to an epoch, asha lets one go on
STOPPING = ("pause", "asha", "hyperband", "median", "none")
COST = "bits"  # the only objective that does not measure quality
SAVED = "search.json"

__all__ = ["Config", "make_config", "method_fields", "run"]


@dataclass
class Config(TrainOptions):
    """Options of ``hashbridge tune``: those of ``train``, where each given hyper-parameter is fixed, and those of the search."""

    trials: int = option(20, "trials in all; with --resume, those of before among them")
    objective: str = option("", f"{', '.join(OBJECTIVES)}; {', '.join(ORACLES)}, which see target labels; two, as information,bits; {DEFAULT}")
    study: str = option("", "name of the search (default: method, source, target)")
    space: str = option("", "YAML file that narrows, widens or fixes the space: `threshold: 0.9`, `bits: [32, 64]`, `hash_weight: {low: 0.1, high: 10}`")
    sampler: str = option("tpe", "what draws the values", SAMPLERS)
    start: str = option("default,paper", "first trials, with commas: default, paper, mlflow (searches there), a search (its best), a YAML file, none")
    confirm: int = option(0, "train the best few again with so many other seeds; the best mean wins")
    finalists: int = option(3, "with --confirm: how many trials are trained again")
    promote: bool = option(False, "with --register: make the model the champion if it is significantly better")
    explain: str = option("", "name of a search: show how much each of its fields matters, and end")
    stop: str = option(
        "pause", "which trials end early, not with two objectives: pause, trials pause after a quarter and half of their epochs, and the best "
        "third goes on, now or later (of trials of several workers: asha); asha, all but the best third of those before end at some epochs; "
        "hyperband, asha that begins at different epochs; median, those below the median of the others' means; none", STOPPING,
    )  # fmt: skip
    concurrency: int = option(0, "trials at once (default: as many as the cluster has room for)")
    trial_workers: int = option(1, "workers of a trial; more than one start Ray Train")
    gpu_share: float = option(1.0, "with --gpu: GPUs of a trial of one worker, as 0.5")
    study_storage: str = option("", "Optuna's storage, an RDB URL (default: SQLite in the search's folder; in a bucket, a journal of objects)")
    oracle: bool = option(False, "measure the trials with the target's labels too, for comparison; nothing is chosen by it")
    resume: bool = option(False, "go on with the search of this name: finish what was cut off, or add trials")  # type: ignore[assignment]
    register: str = option("", "register the best configuration's encoder under this name, alias challenger")
    retrain: bool = option(True, "train the best configuration anew before it is registered; else its trial's checkpoint is")
    workers: int = field(default=0, init=False)
    plots: bool = field(default=False, init=False)
    drawn: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "trial_workers", "finalists"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}, but must be at least 1")
        if self.confirm < 0 or self.confirm == 1:
            raise ValueError(f"--confirm is {self.confirm}, but must be at least 2, or 0 for none")
        if self.confirm and "," in self.objective:
            raise ValueError("--confirm needs one objective: of two there is no best mean")
        if self.promote and not self.register:
            raise ValueError("--promote is of a registered model: give --register NAME")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"--gpu-share is {self.gpu_share}, but must be above 0 and at most 1")
        for name in self.names() if self.objective else ():
            if name not in (*OBJECTIVES, *ORACLES, COST):
                raise ValueError(f"no objective {name!r}: there are {', '.join((*OBJECTIVES, *ORACLES, COST))}")
        if len(self.names()) > 2 or self.names() == [COST]:
            raise ValueError(f"--objective is {self.objective!r}, but must be one objective, or two with a comma")

    def names(self) -> list[str]:
        """Names of the objectives."""
        return self.objective.split(",")

    def maximise(self) -> list[bool]:
        """For each objective, whether larger is better."""
        return [maximised(name) for name in self.names()]

    def folder(self) -> Path:
        """The search's folder."""
        return to_path(self.storage) / (self.study or "-".join(filter(None, ("tune", self.method, self.source, self.target))))


def make_config(values: dict[str, Any]) -> Config | Explain:
    """Build the config; a resumed search's saved options are the defaults of those not given."""
    if values.get("explain"):
        explained: Explain = build(Explain, {name: values[name] for name in ("explain", "storage", "study_storage") if name in values})
        return explained
    named = dict(values)
    if values.get("resume"):
        plain = Config(**{name: str(values.get(name, "")) for name in ("method", "source", "target", "study")} | {"storage": values.get("storage", "runs")})
        saved = runs.read_json(plain.folder() / SAVED)
        named = saved["given"] | values
    config: Config = make_options({name: value for name, value in named.items() if name != "resume"}, Config)
    config.resume = bool(values.get("resume"))
    config.drawn = named
    return config


def _space(config: Config) -> Space:
    method = find_method(config.method)
    own = {each.name for each in fields(method.Config)}
    given = read_yaml(config.space) if config.space else {}
    return space_of(method, config.own, given, own & set(config.drawn), config.bits, COST in config.names())


def _resources(config: Config, threads: int) -> tuple[dict[str, float], int]:
    """Resources of a trial and number of concurrent trials.

    A trial of several workers claims only a token, because Ray refuses trials without resources and Ray Train claims the workers'
    share; the number of such trials is limited here.

    Raises:
        ValueError: the cluster can never provide this.
    """
    cluster.connect()
    rooms = []
    per = {"CPU": float(threads)} | ({"GPU": 1.0 if config.trial_workers > 1 else config.gpu_share} if config.gpu else {})
    for name, count in per.items():
        at_once, wanted = cluster.room(name, count) // config.trial_workers, count * config.trial_workers
        has = "but the cluster's nodes have " + ", ".join(f"{there:g}" for there in cluster.resources(name))
        if not at_once:
            raise ValueError(f"a trial needs {wanted:g} {name}s, {has}: fewer --trial-workers or --threads")
        if config.concurrency > at_once:
            raise ValueError(f"{config.concurrency} trials at once need {wanted * config.concurrency:g} {name}s, {has}")
        rooms.append(at_once)
    return per if config.trial_workers == 1 else {"memory": 2.0**20}, config.concurrency or min(rooms)


def _held(config: Config, manifest: Manifest, labels: bool) -> dict[str, dict[str, Any]]:
    """The training rows as arrays, read once for all single-worker trials; empty if a split exceeds the memory limit."""
    from data.batches import DomainLoader  # noqa: PLC0415

    held: dict[str, dict[str, Any]] = {}
    if config.trial_workers > 1:
        return held
    for role, domain, known in (("source", config.source, labels), ("target", config.target, False)):
        if domain:
            source = DomainLoader(to_path(config.dataset), manifest, domain, "train", 1, labels=known, views=1, cache_mb=config.cache_mb)
            if not source.cached:
                return {}
            rows = source.cached_rows()
            held[role] = {name: None if part is None else part.numpy() for name, part in rows._asdict().items()}
    return held


def run(config: Config | Explain) -> dict[str, Any]:
    """Search; returns the best trial, its values and the folder of the results. Or explain a search."""
    if isinstance(config, Explain):
        return explain(config)
    folder, root = config.folder().resolve(), to_path(config.dataset).resolve()
    manifest = Manifest.read(root)
    space = _space(config)
    config.own, config.bits = {name: space.fixed[name] for name in config.own}, space.fixed[RESERVED]  # values fixed by the space file apply to every trial
    kind = find_method(config.method)
    method = kind(kind.Config(**config.own), tuple(manifest.shape), len(manifest.classes), config.bits)
    labelled = bool(config.source) and any(manifest.split(config.source, "train").labels)
    usual = default_objective(method.can_classify, bool(config.source), labelled)
    config.objective = config.objective or usual
    for name in config.names():
        needs = OBJECTIVES[name].needs if name in OBJECTIVES else ("classes",) * (name == "oracle/accuracy")
        if "classes" in needs and not method.can_classify:
            raise ValueError(f"objective {name} needs class probabilities, and {config.method} has none: use {usual}")
        if "labels" in needs and config.source and not labelled:
            raise ValueError(f"objective {name} needs the source's labels, and {config.source} has none: use {usual}")
        if "source" in needs and not config.source:
            raise ValueError(f"objective {name} needs a source: use {usual}")
    cluster.connect()
    config.threads = config.threads or cluster.threads_each((config.concurrency or 2) * config.trial_workers)
    share, at_once = _resources(config, config.threads)
    options = {each.name: getattr(config, each.name) for each in fields(TrainOptions) if each.init and each.name not in ("own", "resume")}
    options |= config.own | {"workers": config.trial_workers if config.trial_workers > 1 else 0, "dataset": str(root), "plots": False}
    make_plan(prepare(make_options(options)), lambda: config.threads)
    named = config.names()[0]
    start = (config.start, space, find_method(config.method), config.own, config.bits, config.storage, named, _tracking(config))
    first = {} if config.resume else first_trials(*start)
    if (folder / SAVED).exists() and not config.resume:
        raise ValueError(f"search {folder.name} is in {config.storage} already: continue it with --resume, or give another --study")
    folder.mkdir(parents=True, exist_ok=True)
    saved = runs.read_json(folder / SAVED) if config.resume else {"dataset_digest": manifest.digest()}
    if saved["dataset_digest"] != manifest.digest():
        raise ValueError(f"dataset {config.dataset} has changed since search {folder.name} began: start another by --study")
    runs.write_json(folder / SAVED, saved | {"given": {k: v for k, v in config.drawn.items() if k != "resume"} | {"objective": config.objective}})
    storage = config.study_storage or study_in(folder)
    study = open_study(storage, folder.name, config.maximise(), config.sampler, config.seed)
    if not study.trials:
        for name, values in first.items():
            study.enqueue_trial(values, user_attrs={START: name})
    done = recover(study, folder, config.names())
    left, pauses = config.trials - done, _pauses(config)
    if pauses:
        pauses.recall(study.trials, cut_off(study))
    search = left > 0 or bool(pauses and pauses.waits())
    tracker = _tracker(config, folder)
    said = f"{done} of {config.trials} trials are done; {len(space.searched)} values are searched, by {config.objective}"
    print(f"search {folder.name}: {said}", file=sys.stderr)
    oracle = "each" if any(name in ORACLES for name in config.names()) else "last" if config.oracle else ""
    setting, config.concurrency = SearchContext(options, str(folder), oracle), at_once
    held = _held(config, manifest, method.wants.source_labels) if search or config.confirm else {}
    if search:
        _search(config, setting, study, space, max(left, 0), pauses, share, held, tracker)
    confirmed = []
    if config.confirm and (finalists := report.ranked(study)[: config.finalists]):
        seeds = [config.seed + number for number in range(1, config.confirm + 1)]
        confirmed = confirm(finalists, seeds, setting, held, share, at_once, config.names()[0], config.maximise()[0])
    return report.conclude(config, study, folder, tracker, confirmed)


def _tracking(config: Config) -> str:
    """MLflow's address; "" for none."""
    return "" if config.tracking == "none" else config.tracking or default_uri(config.storage)


def _tracker(config: Config, folder: Path) -> Any:
    """The tracker of the search; a resumed search continues its MLflow run."""
    from pipelines.registry.search_tracking import SearchTracker  # noqa: PLC0415  mlflow is slow to import

    saved = runs.read_json(folder / SAVED)
    shared = {"method": config.method, "source": config.source, "target": config.target, "objective": config.objective, "sampler": config.sampler}
    parameters = shared | {"epochs": config.epochs, "dataset_digest": saved["dataset_digest"]}
    tracker = SearchTracker(_tracking(config), folder.name, parameters, saved.get("tracked", ""))
    runs.write_json(folder / SAVED, saved | {"tracked": tracker.tracked})
    return tracker


def _pauses(config: Config) -> Pauses | None:
    """Which trials pause and go on; None if none do: the workers of a trial of several do not wait while an epoch is judged, so asha stops these."""
    if config.stop != "pause" or len(config.names()) > 1 or config.epochs == 1 or config.trial_workers > 1:
        return None
    return Pauses(config.epochs, config.maximise()[0], max(FEWEST, config.finalists if config.confirm else 0))


def _scheduler(config: Config, pauses: Pauses | None) -> Any:
    """What ends trials early in Ray Tune; None if nothing does."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule  # noqa: PLC0415

    if pauses:
        return Pausing(pauses, config.names()[0])
    if config.stop == "none" or len(config.names()) > 1 or config.epochs == 1:
        return None
    name, mode, first = config.names()[0], "max" if config.maximise()[0] else "min", max(1, config.epochs // 4)
    if config.stop == "median":
        never: Any = math.inf  # otherwise it pauses trials for those that wait
        return sparing(MedianStoppingRule)("epoch", name, mode, grace_period=first, min_samples_required=START_UP, min_time_slice=never)
    brackets = sum(first * REDUCTION**number < config.epochs for number in range(config.epochs)) if config.stop == "hyperband" else 1
    return sparing(ASHAScheduler)("epoch", name, mode, max_t=config.epochs, grace_period=first, reduction_factor=REDUCTION, brackets=brackets)


def _search(
    config: Config, setting: SearchContext, study: Any, space: Space, left: int, pauses: Pauses | None, share: dict[str, float], held: dict[str, Any],
    tracker: Any,
) -> None:  # fmt: skip
    """Run the remaining trials."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune  # noqa: PLC0415
    from ray.tune.execution import class_cache, tune_controller  # noqa: PLC0415

    # Tune would put AWS credentials on the trials' command lines, visible to all; trials use those of their own nodes
    class_cache.ENV_VARS_TO_PROPAGATE = {each for each in class_cache.ENV_VARS_TO_PROPAGATE if not each.startswith("AWS_")}
    tune_controller._ObjectCache = KeptActors  # type: ignore[misc]
    name, folder = config.names()[0], to_path(setting.folder)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, setting=setting, held=held), share),
        tune_config=tune.TuneConfig(
            search_alg=TuneSearch(study, space, folder, config.names(), config.maximise(), config.epochs, left, pauses),
            scheduler=_scheduler(config, pauses), num_samples=-1 if pauses else left, max_concurrent_trials=config.concurrency, reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", **cluster.storage_options(folder / "ray"), verbose=0,
            callbacks=[ProgressCallback(folder, name, config.maximise()[0], config.epochs, tracker)],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    )  # fmt: skip
    try:
        tuner.fit()
    finally:
        remove(folder / "ray")
