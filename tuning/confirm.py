"""Trains the best few trials of a search again with other seeds: the best trial of a noisy objective is partly luck."""

import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
from optuna.trial import FrozenTrial

from data.filesystem import atomic_write, remove, to_path
from tuning.trial import ENDED, SearchContext, trial, trial_folder

FOLDER = "confirmed"  # in the search's folder


@dataclass
class Confirmed:
    """A trial with the values of its objective under other seeds."""

    trial: FrozenTrial
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds; the value by which the trial was found is not among them."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def again(config: dict[str, Any], setting: SearchContext, held: dict[str, dict[str, Any]]) -> None:
    """Train one configuration with one seed, the ``job`` of Tune's config, unless that has been done."""
    job = config["job"]
    own = replace(setting, options=setting.options | {"seed": job["seed"]}, folder=_place(setting.folder, job["seed"]))
    if not (trial_folder(to_path(own.folder), job["number"]) / ENDED).is_file():
        trial(job["values"] | {"number": job["number"], "continues": ""}, own, held)


def _place(folder: str, seed: int) -> str:
    return str(to_path(folder) / FOLDER / f"seed-{seed}")


def confirm(
    finalists: list[FrozenTrial], seeds: list[int], setting: SearchContext, held: dict[str, Any], share: dict[str, float], at_once: int,
    name: str, maximise: bool,
) -> list[Confirmed]:  # fmt: skip
    """Train each finalist with each seed, as trials of Ray Tune; what was done before is not trained again.

    Args:
        name: of the objective.

    Returns:
        The finalists that finished with every seed, the best mean first.

    Raises:
        ValueError: none did.
    """
    from ray import tune  # noqa: PLC0415

    from pipelines.console import cluster  # noqa: PLC0415

    folder = to_path(setting.folder)
    jobs = [{"number": each.number, "seed": seed, "values": dict(each.params)} for each in finalists for seed in seeds]
    print(f"confirming {len(finalists)} trials with seeds {', '.join(map(str, seeds))}", file=sys.stderr)
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(again, setting=setting, held=held), share),
            param_space={"job": tune.grid_search(jobs)},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
            run_config=tune.RunConfig(name="confirm", **cluster.storage_options(folder / "ray"), verbose=0),
        ).fit()
    finally:
        remove(folder / "ray")
    found = []
    for each in finalists:
        places = [trial_folder(to_path(_place(setting.folder, seed)), each.number) / ENDED for seed in seeds]
        values = [json.loads(place.read_text())[name] for place in places if place.is_file()]
        if len(values) == len(seeds) and all(map(math.isfinite, values)):
            found.append(Confirmed(each, values))
        else:
            print(f"trial {each.number} is left out: it failed with a seed", file=sys.stderr)
    if not found:
        raise ValueError(f"none of the {len(finalists)} best trials finished with every seed: {folder / FOLDER} has their failures")
    return sorted(found, key=lambda each: each.mean, reverse=maximise)


def write_confirmed(found: list[Confirmed], name: str, out: Path) -> None:
    """Write a row for each finalist as CSV: its number, the value that the search saw, mean, deviation and values under other seeds."""
    rows = [
        {
            "trial": each.trial.number, f"{name} searched": each.trial.value, "mean": each.mean, "deviation": each.deviation,
            "values": " ".join(map(str, each.values)),
        }
        for each in found
    ]  # fmt: skip
    with atomic_write(out / "confirmed.csv") as file:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), file)
