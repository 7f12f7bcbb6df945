"""The trials of the tables' rows: which there are on the data at hand, and their training side by side by Ray Tune."""

import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.filesystem import remove, to_path
from data.manifest import Manifest
from models.registry import find_method
from pipelines.console import cluster
from pipelines.console.cli import error_line
from pipelines.reproduction.reuse import finished_and_cut_off, result_of
from pipelines.reproduction.tables import NEAREST, Row, Table
from pipelines.training.options import TrainOptions, make_options

SHOWN = ("accuracy", "cross/map", "target/map")
Pair = tuple[str, str]  # source ("" if a row has the target alone) and target


@dataclass(frozen=True)
class DataSet:
    """A dataset at hand."""

    root: Path
    manifest: Manifest = field(compare=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.root.name

    def pairs(self, alone: bool) -> list[Pair]:
        """The directions between its domains, or each domain alone."""
        return [("", domain) for domain in self.manifest.domains] if alone else list(itertools.permutations(self.manifest.domains, 2))

    def described(self) -> str:
        """Name, classes and what a row is made of."""
        made, embedding = "", self.manifest.embedding
        if embedding:
            made = f" by {embedding.backbone}" + (f", each with {embedding.views} embedded {embedding.kind} views" if embedding.views else "")
        return f"{self.name}: {len(self.manifest.classes)} classes, {self.manifest.store} {self.manifest.shape}{made}"


def datasets(folder: str) -> list[DataSet]:
    """The dataset in a folder, or those in its folders, sorted by name.

    Raises:
        ValueError: there is none.
    """
    root = to_path(folder)
    places = [root] if (root / "manifest.json").is_file() else sorted(each.parent for each in root.glob("*/manifest.json"))
    if not places:
        raise ValueError(f"no dataset in {folder}: give a folder that `hashbridge ingest` or `hashbridge embed` wrote, or one of several such")
    return [DataSet(place.resolve(), Manifest.read(place)) for place in places]


@dataclass(frozen=True)
class Shared:
    """The options that all trials share: those of ``hashbridge reproduce``."""

    storage: str
    epochs: int
    steps_per_epoch: int
    least_steps: int
    threads: int


@dataclass(frozen=True)
class Trial:
    """A row of a table on one direction of a dataset, at one code length, with one preset and seed."""

    row: Row
    preset: str
    data: DataSet
    pair: Pair
    bits: int
    seed: int

    @property
    def shown(self) -> str:
        """The row's name, with the preset if it is not the default."""
        return self.row.name if self.preset == "default" else f"{self.row.name}, preset {self.preset}"

    def options(self, shared: Shared) -> TrainOptions:
        """The options of its run.

        Raises:
            ValueError: the row does not take this data.
        """
        source, target = self.pair if not self.row.oracle else (self.pair[1], self.pair[1])
        own = {"preset": self.preset} | self.row.settings
        preset = find_method(self.row.method).presets.get(own["preset"])
        given = {} if preset and preset.epochs else {"epochs": shared.epochs}
        folder = f"{self.bits} {self.shown} {source} {target} {self.seed}".replace(" ", "-").replace("/", "-")
        options: TrainOptions = make_options(given | {
            "method": self.row.method, "dataset": str(self.data.root), "source": source, "target": target, "bits": self.bits, "seed": self.seed, "workers": 0,
            "threads": shared.threads, "steps_per_epoch": shared.steps_per_epoch, "least_steps": shared.least_steps, "tracking": "none", "plots": False,
            "storage": str(to_path(shared.storage).resolve() / self.data.name / folder),  # a cluster's workers have other working folders
        } | own)  # fmt: skip
        return options


def suits(row: Row, data: DataSet) -> bool:
    """Whether a row takes a dataset's kind of rows: some take features alone, some no photographs, CoGAN digits alone."""
    shape = data.manifest.shape
    if len(shape) == 1:
        return row.method != "cogan"
    small = min(shape[1:]) < 64
    return row.method != NEAREST and row.settings.get("preset") != "features" and (small or row.method not in ("cogan", "drcn"))


def planned(
    table: Table, found: Iterable[DataSet], pairs: list[Pair], rows: list[str], presets: list[str], bits: list[int], seeds: list[int]
) -> list[Trial]:  # fmt: skip
    """The trials of a table: those of ``pairs`` and ``rows`` if they are given, and of ``bits`` in place of the table's."""
    trials = []
    for data in found:
        for pair, length, row, preset in itertools.product(data.pairs(table.alone), bits or table.bits, table.rows, presets):
            fits = suits(row, data) and (not pairs or pair in pairs) and (not rows or row.name in rows)
            own = preset == "default" or (row.method != NEAREST and "preset" not in row.settings and preset in find_method(row.method).presets)
            trials += [Trial(row, preset, data, pair, length, seed) for seed in seeds if fits and own]
    return trials


def run_trials(trials: list[Trial], shared: Shared, concurrency: int) -> dict[str, str]:
    """Train, as trials of Ray Tune, what is not there yet; returns the messages of those that failed, by folder of their runs."""
    wanted = {options.storage: options for options in (trial.options(shared) for trial in trials if trial.row.method != NEAREST)}
    left = {folder: options for folder, options in wanted.items() if finished_and_cut_off(options)[0] is None}
    print(f"{len(wanted)} trials, of which {len(wanted) - len(left)} are there already", file=sys.stderr, flush=True)
    return _tuned(left, shared, concurrency) if left else {}


def _train(given: dict[str, Any], wanted: dict[str, TrainOptions]) -> dict[str, Any]:
    """One trial: a run, or the rest of one that was cut off. What would fail again is told, not raised: Tune would try it again."""
    try:
        result = result_of(wanted[given["folder"]])
    except (ValueError, FloatingPointError) as error:
        return {"failed": error_line(error)}
    return {"seconds": result["seconds"]} | {name: result["metrics"][name] for name in SHOWN if name in result["metrics"]}


def _tuned(left: dict[str, TrainOptions], shared: Shared, concurrency: int) -> dict[str, str]:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    cluster.connect()
    if not cluster.room("CPU", shared.threads):
        raise ValueError(f"a trial needs {shared.threads} CPUs, but the cluster's largest node has {max(cluster.resources('CPU')):g}: fewer --threads")
    from ray import tune  # noqa: PLC0415

    class Progress(tune.Callback):
        """A line for each trial that ended; the messages of those that failed."""

        ended, failed = 0, dict[str, str]()

        def _show(self, trial: Any, told: str) -> None:
            Progress.ended += 1
            print(f"[{Progress.ended}/{len(left)}] {Path(trial.config['folder']).name}: {told}", file=sys.stderr, flush=True)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            """A trial has ended."""
            told = trial.last_result
            if "failed" in told:
                self._fail(trial, told["failed"])
                return
            self._show(trial, "  ".join(f"{name} {told[name]:.3f}" for name in SHOWN if name in told) + f"  {told['seconds']:.0f} s")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            """A trial has failed."""
            self._fail(trial, error_line(trial.get_error() or RuntimeError("its process died"))[-300:])

        def _fail(self, trial: Any, reason: str) -> None:
            Progress.failed[trial.config["folder"]] = reason
            self._show(trial, f"failed: {reason}")

    Progress.ended, Progress.failed = 0, {}
    place = to_path(shared.storage) / "ray"
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_train, wanted=left), {"CPU": float(shared.threads)}),
            param_space={"folder": tune.grid_search([*left])},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrency or None, reuse_actors=True),
            run_config=tune.RunConfig(
                name="reproduce", **cluster.storage_options(place), verbose=0, callbacks=[Progress()], failure_config=tune.FailureConfig(max_failures=2),
            ),
        ).fit()  # fmt: skip
    finally:
        remove(place)
    return Progress.failed
