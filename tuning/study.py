"""The Optuna study of a search: opened, recovered after a crash, driven by Ray Tune, and shown."""

import math
import sys
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.utils.object_cache import _ObjectCache

from data.filesystem import is_local, move, to_path, write_text
from data.transforms import seeded_generator
from pipelines.registry.connection import sqlite_path
from pipelines.training import runs
from tuning.journal import Journal
from tuning.objectives import OBJECTIVES
from tuning.pausing import PausedSampler, Pauses
from tuning.space import Space
from tuning.trial import BESIDE, ENDED, FAILED, trial_folder

START_UP = 4  # trials that are drawn at random, or given, before a sampler learns from them
CONTINUES, START = "continues", "start"  # user attributes: number of the interrupted or paused trial that it continues; where a first trial's values are from
DEFAULTS = "default"  # START of the trial of the method's defaults
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Create a sampler by name."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if name == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed, n_startup_trials=START_UP)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=START_UP)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=START_UP, with_margin=True)


def study_in(folder: Path) -> str:
    """Where a search's study is unless it is told otherwise: a SQLite file in the search's folder, or in a bucket a journal of objects."""
    return f"sqlite:///{sqlite_path(folder.resolve())}/study.db" if is_local(folder) else f"{folder}/study"


def open_study(storage: str, name: str, maximise: list[bool], sampler: str, seed: int) -> optuna.Study:
    """Open the study of a search, or create it.

    A resumed search uses another seed, because the old one would draw the first trials again.

    Raises:
        ValueError: the storage does not answer, or its study has other objectives.
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
    again = seeded_generator(seed, len(study.trials)).initial_seed() % 2**32  # seed + trials would be another search's
    study.sampler = sampler_of(sampler, again if study.trials else seed)
    return study


def recover(study: optuna.Study, folder: Path, names: list[str]) -> int:
    """Repair the study of a killed search; returns the number of finished trials.

    A trial that finished without being recorded is recorded. An interrupted trial is queued again with the same values and
    continues from its last checkpoint, if it has one.
    """
    for each in study.trials:
        if each.state != TrialState.RUNNING:
            continue
        place, old = trial_folder(folder, each.number), each.user_attrs.get(CONTINUES)
        if old is not None and not place.exists() and trial_folder(folder, old).exists():
            move(trial_folder(folder, old), place)  # it was killed before it did this itself
        if (place / ENDED).is_file():
            told = runs.read_json(place / ENDED)
            study.tell(each.number, [told[name] for name in names])
            print(f"trial {each.number} had finished; it is now recorded", file=sys.stderr)
            continue
        study.tell(each.number, state=TrialState.FAIL)
        kept = "from its last checkpoint" if any((place / "checkpoints").glob("*")) else "from its beginning, as it had no checkpoint yet"
        print(f"trial {each.number} was interrupted: it continues as another trial, {kept}", file=sys.stderr)
        study.enqueue_trial(each.params, user_attrs=each.user_attrs | {CONTINUES: each.number})
    return sum(each.state.is_finished() for each in study.trials) - len(cut_off(study))


def cut_off(study: optuna.Study) -> set[int]:
    """Numbers of the trials that were interrupted or had paused, and that other trials continue."""
    return {each.user_attrs[CONTINUES] for each in study.trials if CONTINUES in each.user_attrs}


def reason(folder: Path, number: int) -> str:
    """Why a trial failed; "" if it did not."""
    place = trial_folder(folder, number) / FAILED
    return place.read_text() if place.is_file() else ""


class Draw:
    """The function with which Tune draws a trial: values, number, the folder of the trial it continues, and whether it is never stopped early."""

    def __init__(self, space: Space, folder: Path) -> None:
        self.space, self.folder = space, folder

    def __call__(self, trial: Any) -> dict[str, Any]:
        self.space(trial)
        old = trial.user_attrs.get(CONTINUES)
        spared = trial.user_attrs.get(START) == DEFAULTS
        return {"number": trial.number, "continues": "" if old is None else str(trial_folder(self.folder, old)), "spared": spared}


class TuneSearch(OptunaSearch):
    """Optuna's search algorithm for Tune. Trials stopped early are recorded as pruned instead of complete."""

    def __init__(
        self, study: optuna.Study, space: Space, folder: Path, names: list[str], maximise: list[bool], epochs: int, left: int = 0, pauses: Pauses | None = None,
    ) -> None:  # fmt: skip
        """Args:
            left: with ``pauses``: how many trials are to be drawn.
            pauses: which trials pause and go on, with what an earlier part of the search left; None if none do.
        """
        modes = ["max" if more else "min" for more in maximise]
        single = len(names) == 1
        self.epochs, self.folder, self.left, self.pauses = epochs, folder, left, pauses
        self.continued = cut_off(study) if pauses else set[int]()
        self.past: dict[str, int] = {}  # Tune's ids of the trials that go on after a pause, and its epoch
        super().__init__(
            Draw(space, folder), names[0] if single else names, modes[0] if single else modes,
            sampler=PausedSampler(study.sampler, self.continued) if pauses else study.sampler, study_name=study.study_name, storage=study._storage,
        )  # fmt: skip

    def suggest(self, trial_id: str) -> Any:
        """The values of the next trial: of one that has paused and goes on, or else of a new one. None while it is not known yet, FINISHED in the end."""
        if self.pauses:
            running = self._ot_trials.keys() - self._completed_trials
            if found := self.pauses.next(lambda epoch: self.left > 0 or any(self._comes(each, epoch) for each in running)):
                self.past[trial_id] = found[0]
                self._go_on(found[1])
            elif self.left:
                self.left -= 1
            else:
                return None if running else Searcher.FINISHED
        return super().suggest(trial_id)

    def _comes(self, trial_id: str, epoch: int) -> bool:
        """Whether a running trial will come to a pause."""
        assert self.pauses is not None
        return self.past.get(trial_id, 0) < epoch and self._ot_trials[trial_id].number not in self.pauses.values[epoch]

    def _go_on(self, number: int) -> None:
        """Queue a trial that has paused as another one, which continues it."""
        assert self._ot_study is not None
        self.continued.add(number)
        paused = self._ot_study.get_trials(deepcopy=False)[number]
        self._ot_study.enqueue_trial(paused.params, user_attrs=paused.user_attrs | {CONTINUES: number})

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch's value to Optuna."""
        if isinstance(self.metric, str) and math.isfinite(result[self.metric]):
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report the end of a trial to Optuna."""
        if trial_id in self._completed_trials:
            return
        trial, values, state = self._ot_trials[trial_id], None, TrialState.FAIL
        if result and not error:
            metrics = [self.metric] if isinstance(self.metric, str) else self.metric
            values = [result[name] for name in metrics]
            state = TrialState.COMPLETE if result["epoch"] >= self.epochs else TrialState.PRUNED
            if state == TrialState.PRUNED:
                self.on_trial_result(trial_id, result)  # Tune does not do this after the epoch with which a trial is stopped
            if not all(map(math.isfinite, values)):
                values, state = None, TrialState.FAIL
                write_text(trial_folder(self.folder, trial.number) / FAILED, f"{metrics[0]} is not a number")
        assert self._ot_study is not None
        self._ot_study.tell(trial, values if state == TrialState.COMPLETE else None, state)
        self._completed_trials.add(trial_id)


class KeptActors(_ObjectCache):  # type: ignore[misc]
    """Keeps the actor of each trial that has ended for the next one, which takes five seconds to start otherwise.

    Ray Tune keeps as many as there are trials waiting, or one: with several trials at once none waits, and the others' actors ended with
    them. All trials of a search take the same resources, so a kept actor stands in nobody's way.
    """

    def cache_object(self, key: Any, obj: Any) -> bool:
        """Keep an actor."""
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        """The actors that are to end: all at the end of the search, none before."""
        if force_all:
            yield from super().flush_cached_objects(force_all=True)


def sparing(kind: Any) -> Any:
    """A scheduler that never stops the trial of the defaults, so that a search says what it has gained on them."""

    class Sparing(kind):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            """Go on with the defaults; what they reached still counts for the others."""
            decision: str = super().on_trial_result(tune_controller, trial, result)
            return TrialScheduler.CONTINUE if trial.config["spared"] else decision

    return Sparing


class ProgressCallback(Callback):
    """Shows the trials: a live table on a terminal, otherwise one line per event. Also tracks them."""

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
        """A trial starts."""
        old = to_path(trial.config["continues"]).name.rpartition("-")[2]
        self.tracker.begin(trial.config["number"], {name: value for name, value in trial.config.items() if name not in BESIDE}, int(old or -1))
        self._note(trial, f"continues {int(old)}" if old else "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """An epoch has finished."""
        number = trial.config["number"]
        self.rows[number] = ("running", result["epoch"], result[self.name])
        told = {name: value for name, value in result.items() if name in OBJECTIVES or name.startswith("oracle/")}
        self.tracker.epoch(number, result["epoch"], told)
        self._note(trial, "running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, early or not."""
        ended = self.rows[trial.config["number"]][1] >= self.epochs
        self.tracker.end(trial.config["number"], "FINISHED" if ended else "KILLED")
        self._note(trial, "complete" if ended else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; if its process died, Ray's message is the reason."""
        number = trial.config["number"]
        place = trial_folder(self.folder, number)
        if not (place / FAILED).is_file():
            write_text(place / FAILED, " ".join(str(trial.get_error() or "its process died").split())[:500])
        self.tracker.end(number, "FAILED")
        self._note(trial, "failed: " + reason(self.folder, number)[:100])
