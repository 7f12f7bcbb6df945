"""Asynchronous successive halving that pauses trials: after a part of its epochs a trial pauses, and the best of those that paused go on."""

import copy
import math
from collections.abc import Callable, Container
from typing import Any

from optuna import Study
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

SHARE = 3  # of so many trials that paused after an epoch one goes on
FEWEST = 3  # trials that go on in the end, however few there are


class Pauses:
    """Which trials have come to the pauses, and which of them went on (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020).

    A trial goes on as soon as it is one of the best ``1 / SHARE`` of all that came to its pause, also when worse ones come after it. Where
    trials are stopped for good, the first ones are trained to their end because there is nothing to compare them with.

    Attributes:
        values: for each epoch after which trials pause, those that came to it, by number, and their values, of which more is better.
        gone: for each of these epochs the trials that do not wait: they went on, or failed.
    """

    def __init__(self, epochs: int, maximise: bool, fewest: int = FEWEST) -> None:
        """Args:
            epochs: of a trial.
            maximise: whether more is better.
            fewest: of the trials at a pause so many go on in the end.
        """
        self.sign, self.fewest = 1 if maximise else -1, fewest
        self.values: dict[int, dict[int, float]] = {epoch: {} for epoch in sorted({max(1, epochs // 4), max(1, epochs // 2)})}
        self.gone: dict[int, set[int]] = {epoch: set() for epoch in self.values}

    def add(self, epoch: int, number: int, value: float) -> None:
        """A trial has come to a pause with a value; if that is not a number, it never goes on."""
        self.values[epoch][number] = self.sign * value if math.isfinite(value) else -math.inf
        if not math.isfinite(value):
            self.gone[epoch].add(number)

    def _best(self, epoch: int, last: bool = False) -> list[int]:
        """The trials that wait at a pause and are to go on, the best first; if none will come any more, at least ``fewest`` go on."""
        values = self.values[epoch]
        count = max(len(values) // SHARE, self.fewest if last else 0)
        return [number for number in sorted(values, key=lambda number: -values[number])[:count] if number not in self.gone[epoch]]

    def goes_on(self, epoch: int, number: int, spared: bool) -> bool:
        """Whether a trial that has come to a pause goes on at once."""
        on = spared or number in self._best(epoch)
        if on:
            self.gone[epoch].add(number)
        return on

    def next(self, coming: Callable[[int], bool]) -> tuple[int, int] | None:
        """The pause and number of the best trial that waits and is to go on, of the last pause that has one; None if there is none.

        Args:
            coming: whether trials that are running or not yet drawn will come to a pause.
        """
        found, last = None, True
        for epoch in self.values:
            last = last and not coming(epoch)
            if best := self._best(epoch, last):
                found, last = (epoch, best[0]), False
        if found:
            self.gone[found[0]].add(found[1])
        return found

    def waits(self) -> bool:
        """Whether a trial would go on if none came any more."""
        return any(self._best(epoch, True) for epoch in self.values)

    def recall(self, trials: list[FrozenTrial], continued: set[int]) -> None:
        """Take up the trials of an earlier part of the search; of these, those that paused and that no other continues wait."""
        for each in trials:
            for epoch in self.values if each.state.is_finished() else ():
                if epoch in each.intermediate_values:
                    self.add(epoch, each.number, each.intermediate_values[epoch])
                    if each.state != TrialState.PRUNED or each.number in continued or max(each.intermediate_values) > epoch:
                        self.gone[epoch].add(each.number)


class Pausing(FIFOScheduler):  # type: ignore[misc]
    """Ends a trial that comes to a pause, unless it goes on at once. ``TuneSearch`` goes on with the others when their turn comes."""

    def __init__(self, pauses: Pauses, metric: str) -> None:
        super().__init__()
        self.pauses, self.name = pauses, metric

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on with a trial, or end it for now; the trial of the defaults always goes on."""
        number, epoch = trial.config["number"], result["epoch"]
        if epoch not in self.pauses.values:
            return TrialScheduler.CONTINUE
        self.pauses.add(epoch, number, result[self.name])
        return TrialScheduler.CONTINUE if self.pauses.goes_on(epoch, number, trial.config["spared"]) else TrialScheduler.STOP


class PausedSampler(BaseSampler):
    """A sampler for which a trial that has paused is worth its last value, and which does not see the first part of one that went on.

    Optuna's samplers rank what was ended early below all that finished, whatever its value, or leave it out.

    Attributes:
        hidden: numbers of the trials that others continue.
    """

    def __init__(self, sampler: BaseSampler, hidden: set[int]) -> None:
        self.sampler, self.hidden = sampler, hidden

    def _seen(self, study: Study) -> Study:
        def trials(deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False) -> list[FrozenTrial]:
            found = [_valued(each) for each in study._get_trials(deepcopy, None, use_cache) if each.number not in self.hidden]
            return [each for each in found if states is None or each.state in states]

        seen = copy.copy(study)
        seen._get_trials = trials  # type: ignore[method-assign]
        return seen

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
        """The space that is drawn at once."""
        return self.sampler.infer_relative_search_space(self._seen(study), trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        """Values that are drawn at once."""
        return self.sampler.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """A value that is drawn by itself."""
        return self.sampler.sample_independent(self._seen(study), trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A trial begins."""
        self.sampler.before_trial(self._seen(study), trial)


def _valued(trial: FrozenTrial) -> FrozenTrial:
    """A trial that was ended early as one that finished with its last value; others as they are."""
    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return trial
    found = copy.copy(trial)
    found.state, found.value = TrialState.COMPLETE, trial.intermediate_values[max(trial.intermediate_values)]
    return found
