"""The results of a search: a table of trials, the best configuration as a file, plots, and the registered model."""

import contextlib
import json
import math
import os
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml
from optuna.trial import FrozenTrial, TrialState

from data.filesystem import atomic_write, write_text
from pipelines import promote, register, train
from pipelines.training import runs
from pipelines.training.options import TrainOptions, make_options
from pipelines.training.plan import make_plan, prepare
from tuning.confirm import Confirmed, write_confirmed
from tuning.explain import compared, evaluator
from tuning.study import DEFAULTS, START, STATES, cut_off, reason
from tuning.trial import JUDGED, trial_folder

RESULTS = "results"  # in the search's folder


def judged(folder: Path, number: int) -> list[dict[str, Any]]:
    """A trial's records by epoch."""
    place = trial_folder(folder, number) / JUDGED
    return [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []


def table(study: optuna.Study, folder: Path) -> list[dict[str, Any]]:
    """One row per finished trial: number, status, start-up time in seconds, values, last metrics, and the reason of a failure."""
    gone, rows = cut_off(study), []
    for each in study.trials:
        if each.number in gone or not each.state.is_finished():
            continue
        last = (judged(folder, each.number) or [{}])[-1]
        started = {"start_up": last.pop("began") - each.datetime_start.timestamp()} if last and each.datetime_start else {}
        rows.append({"number": each.number, "status": STATES[each.state]} | started | last | each.params | {"reason": reason(folder, each.number)})
    return rows


def write_table(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the table as CSV and Parquet."""
    names = list({name: None for row in rows for name in row})
    columns = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    with atomic_write(out / "trials.csv") as file:
        pyarrow.csv.write_csv(columns, file)
    with atomic_write(out / "trials.parquet") as file:
        pyarrow.parquet.write_table(columns, file)


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials of a search with one objective, the best first; each configuration once."""
    ended = [each for each in study.trials if each.state == TrialState.COMPLETE and each.value is not None]
    ended.sort(key=lambda each: each.value or 0.0, reverse=study.direction.name == "MAXIMIZE")
    return [each for number, each in enumerate(ended) if each.params not in [other.params for other in ended[:number]]]


def knee(study: optuna.Study, front: list[FrozenTrial]) -> FrozenTrial | None:
    """The trial of a front of two objectives that lies farthest beyond the line between the front's ends; None if none does."""
    better = np.array([1.0 if each.name == "MAXIMIZE" else -1.0 for each in study.directions])
    points = np.array([each.values for each in front]) * better
    scaled = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)  # the ends are (0, 1) and (1, 0)
    beyond = scaled.sum(1) - 1
    return front[int(beyond.argmax())] if beyond.max() > 1e-9 and len(front) > 2 else None


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or the Pareto front sorted by the first objective; empty if no trial has finished."""
    if not any(each.state == TrialState.COMPLETE for each in study.trials):
        return []
    if len(study.directions) == 1:
        return [study.best_trial]
    return sorted(study.best_trials, key=lambda each: each.values[0], reverse=study.directions[0].name == "MAXIMIZE")


def options_of(config: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    """A trial's options, in the form of ``hashbridge train --config``."""
    names = ("method", "dataset", "source", "target", "bits", "epochs", "steps_per_epoch", "seed")
    return {name: getattr(config, name) for name in names} | config.own | drawn


def draw(study: optuna.Study, names: list[str], out: Path) -> None:
    """Plot history, importances, slices and, for two objectives, the Pareto front, as far as the trials allow.

    Importances and slices show all trials after the epoch to which all came, because few finish where the others end early.
    """
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415
    from optuna.visualization import matplotlib as charts  # noqa: PLC0415

    trials, epoch = compared(study)
    after = f"{names[0]} after epoch {epoch}" if epoch else names[0]
    first: dict[str, Any] = {"target": lambda each: each.values[0]}
    best = {} if len(names) == 1 else first  # where Optuna is given a target, it draws no line for the best so far
    kinds: dict[str, tuple[Any, optuna.Study, str, dict[str, Any]]] = {
        "history": (charts.plot_optimization_history, study, names[0], best),
        "importances": (charts.plot_param_importances, trials, after, {"evaluator": evaluator()} | first),
        "slices": (charts.plot_slice, trials, after, first),
    }

    def save(name: str) -> None:
        with atomic_write(out / f"{name}.png") as file:
            pyplot.savefig(file, dpi=110, bbox_inches="tight")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(names) == 2:
            charts.plot_pareto_front(study, target_names=names)
            save("pareto")
            pyplot.close("all")
        for name, (chart, shown, label, more) in kinds.items():
            with contextlib.suppress(ValueError, RuntimeError):  # too few trials, or no differences
                chart(shown, target_name=label, **more)
                save(name)
            pyplot.close("all")


def conclude(config: Any, study: optuna.Study, folder: Path, tracker: Any, confirmed: list[Confirmed]) -> dict[str, Any]:
    """Write the results, track and print them, and register the best model; returns them.

    Args:
        confirmed: the finalists under other seeds, the best mean first; it is the best then. Empty if none were trained again.

    Raises:
        ValueError: no trial has finished; gives the last failure.
    """
    rows, best = table(study, folder), best_trials(study)
    counts = {status: sum(row["status"] == status for row in rows) for status in STATES.values()}
    out = folder / RESULTS
    if rows:
        write_table(rows, out)
    if not best:
        tracker.finish(out, {}, "FAILED")
        said = next((row["reason"] for row in reversed(rows) if row["reason"]), "")
        raise ValueError(f"search {folder.name}: none of {len(rows)} trials finished" + (f"; the last failed: {said}" if said else ""))
    if confirmed:
        best = [confirmed[0].trial]
        write_confirmed(confirmed, config.names()[0], out)
    write_text(out / "best.yaml", yaml.safe_dump(options_of(config, best[0].params), sort_keys=False))
    names = config.names()
    draw(study, names, out)
    values = {name: value for each in best[:1] for name, value in zip(names, each.values, strict=True)}
    tracker.finish(out, values, "FINISHED")
    print(f"search {folder.name}: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count) + "; " + _start_up(rows))
    for each in best:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in zip(names, each.values, strict=True))
        print(f"trial {each.number}: {figures}  " + " ".join(f"{name}={_short(value)}" for name, value in each.params.items()))
    if defaults := next((each for each in study.trials if each.user_attrs.get(START) == DEFAULTS and each.state == TrialState.COMPLETE), None):
        print(f"the defaults, trial {defaults.number}: " + "  ".join(f"{name} {value:.4f}" for name, value in zip(names, defaults.values, strict=True)))
    for candidate in confirmed:
        seen = f"{names[0]} {candidate.mean:.4f} ± {candidate.deviation:.4f} with {len(candidate.values)} other seeds"
        print(f"trial {candidate.trial.number}: {seen} (in the search {candidate.trial.value:.4f})")
    if bent := knee(study, best) if len(names) == 2 else None:
        print(f"knee of the front: trial {bent.number}, " + "  ".join(f"{name} {value:.4f}" for name, value in zip(names, bent.values, strict=True)))
    print(f"table, pictures and best.yaml in {out}; train with `hashbridge train --config {out / 'best.yaml'}`")
    found = {"study": study.study_name, "trial": best[0].number, "values": values, "params": best[0].params, "trials": counts, "results": str(out)}
    found |= {"confirmed": [{"trial": each.trial.number, "mean": each.mean, "deviation": each.deviation} for each in confirmed]} if confirmed else {}
    found |= {"knee": bent.number} if bent else {}
    return found | (_register(config, best[0], folder, tracker.uri) if config.register else {})


def _start_up(rows: list[dict[str, Any]]) -> str:
    """Time from the draw of a trial to its training."""
    taken = [row["start_up"] for row in rows if "start_up" in row]
    return f"a trial started in {statistics.median(taken):.1f} s (median; at most {max(taken):.1f} s)"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _register(config: Any, best: FrozenTrial, folder: Path, uri: str) -> dict[str, Any]:
    """Register the best configuration, retrained or from its trial's checkpoint; returns run id and version."""
    storage = config.storage
    uri = config.tracking or ("" if os.environ.get("MLFLOW_TRACKING_URI") else uri)  # MLFLOW_TRACKING_URI may contain a password and stays in the environment
    if config.retrain:
        print(f"retraining the configuration of trial {best.number}", file=sys.stderr)
        result = train.run(make_options(options_of(config, best.params) | {"storage": storage, "tracking": uri, "workers": 0}))
        run_id = result["run_id"]
    else:
        place, storage = trial_folder(folder, best.number), str(folder)
        setup = prepare(TrainOptions(**runs.options(runs.read_config(place))))
        plan = replace(make_plan(setup, lambda: setup.options.threads), folder=str(place))
        train.conclude(plan, setup, place, judged(folder, best.number)[-1]["seconds"])
        run_id = place.name
    version = register.run(register.Config(run_id, name=config.register, storage=storage, tracking="" if uri == "none" else uri))
    found = {"run_id": run_id, "version": version["version"]}
    if config.promote:
        told = promote.run(promote.Config(config.register, storage=storage, tracking="" if uri == "none" else uri, seed=config.seed))
        found["promoted"] = told["promoted"]
    return found
