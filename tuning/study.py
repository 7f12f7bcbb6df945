"""The Optuna study behind a search: opened, recovered after a crash, fed by Ray Tune, and watched."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.search.optuna import OptunaSearch

from data.filesystem import write_text
from pipelines.training import runs
from tuning.journal import Journal
from tuning.objectives import OBJECTIVES
from tuning.space import Space
from tuning.trial import ENDED, FAILED, trial_folder

CONTINUES = "continues"  # attribute of a trial: the number of the one that it goes on with
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by its name."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if name == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=5)


def open_study(storage: str, name: str, maximise: list[bool], sampler: str, seed: int) -> optuna.Study:
    """The study of a search, made where it is not there yet.

    A search that goes on draws from another seed than before, or its first trials would be drawn again.

    Raises:
        ValueError: the storage does not answer, or the study in it has other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    directions = [StudyDirection.MAXIMIZE if more else StudyDirection.MINIMIZE for more in maximise]
    try:
        remote = storage.startswith("s3://")
        backend: Any = optuna.storages.JournalStorage(Journal(storage)) if remote else optuna.storages.RDBStorage(storage)
        study = optuna.create_study(storage=backend, study_name=name, directions=directions, load_if_exists=True)
    except (SQLAlchemyError, ImportError) as error:
        raise ValueError(f"study storage {storage.rpartition('@')[2]}: {str(error).splitlines()[0]}") from error
    if study.directions != directions:
        raise ValueError(f"study {name} has other objectives: give another --study")
    study.sampler = sampler_of(sampler, seed + len(study.trials))
    return study


def recover(study: optuna.Study, folder: Path, names: list[str]) -> int:
    """Set right what a killed search left; returns how many trials are over.

    A trial that ended unrecorded is recorded. One that was cut off is queued again with its values, to go on from its last
    checkpoint where it has one.
    """
    for each in study.trials:
        if each.state != TrialState.RUNNING:
            continue
        place = trial_folder(folder, each.number)
        if (place / ENDED).is_file():
            told = runs.read_json(place / ENDED)
            study.tell(each.number, [told[name] for name in names])
            print(f"trial {each.number} had ended: it is recorded", file=sys.stderr)
            continue
        study.tell(each.number, state=TrialState.FAIL)
        kept = "from its last checkpoint" if any((place / "checkpoints").glob("*")) else "from its beginning, as it had no checkpoint yet"
        print(f"trial {each.number} was cut off: it goes on as another, {kept}", file=sys.stderr)
        study.enqueue_trial(each.params, user_attrs={CONTINUES: each.number})
    return sum(each.state.is_finished() for each in study.trials) - len(cut_off(study))


def cut_off(study: optuna.Study) -> set[int]:
    """Numbers of the trials that others go on with."""
    return {each.user_attrs[CONTINUES] for each in study.trials if CONTINUES in each.user_attrs}


def reason(folder: Path, number: int) -> str:
    """Why a trial failed; "" where it did not."""
    place = trial_folder(folder, number) / FAILED
    return place.read_text() if place.is_file() else ""


class Draw:
    """A space as the function that Tune draws a trial by: the values, the trial's number, and whose folder it goes on with."""

    def __init__(self, space: Space, folder: Path) -> None:
        self.space, self.folder = space, folder

    def __call__(self, trial: Any) -> dict[str, Any]:
        self.space(trial)
        old = trial.user_attrs.get(CONTINUES)
        return {"number": trial.number, "continues": "" if old is None else str(trial_folder(self.folder, old))}


class TuneSearch(OptunaSearch):
    """Optuna's search as Tune drives it; a trial that a scheduler stopped is told as pruned, not as finished with what it had."""

    def __init__(self, study: optuna.Study, space: Space, folder: Path, names: list[str], maximise: list[bool], epochs: int) -> None:
        modes = ["max" if more else "min" for more in maximise]
        single = len(names) == 1
        super().__init__(
            Draw(space, folder), names[0] if single else names, modes[0] if single else modes, sampler=study.sampler,
            study_name=study.study_name, storage=study._storage,
        )  # fmt: skip
        self.epochs, self.folder = epochs, folder

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna an epoch's value."""
        if isinstance(self.metric, str) and math.isfinite(result[self.metric]):
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the end."""
        if trial_id in self._completed_trials:
            return
        trial, values, state = self._ot_trials[trial_id], None, TrialState.FAIL
        if result and not error:
            metrics = [self.metric] if isinstance(self.metric, str) else self.metric
            values = [result[name] for name in metrics]
            state = TrialState.COMPLETE if result["epoch"] >= self.epochs else TrialState.PRUNED
            if not all(map(math.isfinite, values)):
                values, state = None, TrialState.FAIL
                write_text(trial_folder(self.folder, trial.number) / FAILED, f"{metrics[0]} is not a number")
        assert self._ot_study is not None
        self._ot_study.tell(trial, values if state == TrialState.COMPLETE else None, state)
        self._completed_trials.add(trial_id)


class ProgressCallback(Callback):
    """Shows the trials as they go: a table that is drawn anew on a terminal, else a line an event. Tells the tracker, too."""

    def __init__(self, folder: Path, name: str, maximise: bool, epochs: int, tracker: Any) -> None:
        self.folder, self.name, self.maximise, self.epochs, self.tracker = folder, name, maximise, epochs, tracker
        self.rows: dict[int, tuple[str, int, float]] = {}
        self.best, self.drawn = math.nan, 0

    def _note(self, trial: Any, status: str) -> None:
        number = trial.config["number"]
        _, epoch, value = self.rows.get(number, ("", 0, math.nan))
        self.rows[number] = (status, epoch, value)
        if status == "complete" and not (self.best >= value if self.maximise else self.best <= value):
            self.best = value
        self._show(number)

    def _line(self, number: int) -> str:
        status, epoch, value = self.rows[number]
        shown = "" if math.isnan(value) else f"{self.name} {value:.4f}"
        return f"trial {number:>4}  {status:<14} epoch {epoch:>3}/{self.epochs}  {shown}"

    def _show(self, number: int) -> None:
        best = "" if math.isnan(self.best) else f"  best {self.best:.4f}"
        if not sys.stderr.isatty():
            print(self._line(number) + best, file=sys.stderr, flush=True)
            return
        lines = [self._line(each) for each in sorted(self.rows)[-15:]] + [f"{len(self.rows)} trials{best}"]
        print((f"\x1b[{self.drawn}F" if self.drawn else "") + "".join(f"\x1b[2K{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
        self.drawn = len(lines)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self.tracker.begin(trial.config)
        self._note(trial, "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """An epoch is judged."""
        number = trial.config["number"]
        self.rows[number] = ("running", result["epoch"], result[self.name])
        told = {name: value for name, value in result.items() if name in OBJECTIVES or name.startswith("oracle/")}
        self.tracker.epoch(number, result["epoch"], told)
        self._note(trial, "running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is over, at its end or before."""
        ended = self.rows[trial.config["number"]][1] >= self.epochs
        self.tracker.end(trial.config["number"], "FINISHED" if ended else "KILLED")
        self._note(trial, "complete" if ended else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; where its process died, its reason is what Ray says of it."""
        number = trial.config["number"]
        place = trial_folder(self.folder, number)
        if not (place / FAILED).is_file():
            write_text(place / FAILED, " ".join(str(trial.get_error() or "its process died").split())[:500])
        self.tracker.end(number, "FAILED")
        self._note(trial, "failed: " + reason(self.folder, number)[:100])
