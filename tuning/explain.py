"""How much each searched field matters: shares of the objective's variance over a search's trials."""

import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from data.filesystem import to_path
from pipelines.console.config import option
from pipelines.training import runs
from tuning.objectives import maximised
from tuning.study import open_study, study_in

FEWEST = 4  # finished trials


@dataclass
class Explain:
    """Options of ``hashbridge tune --explain``."""

    explain: str = option("", "name of a search: show how much each of its fields matters")
    storage: str = option("runs", "folder of runs and searches")
    study_storage: str = option("", "Optuna's storage of the search")


def compared(study: optuna.Study) -> tuple[optuna.Study, int]:
    """A search's trials where they can be compared: where some ended early, all with their values after the epoch that all came to; and that epoch, or 0."""
    early = [each for each in study.trials if each.state == TrialState.PRUNED and each.intermediate_values]
    if not early:
        return study, 0
    epoch = min(max(each.intermediate_values) for each in early)
    found = optuna.create_study(direction=study.direction)
    for each in study.trials:
        if each.state in (TrialState.COMPLETE, TrialState.PRUNED) and epoch in each.intermediate_values:  # where a trial paused, its second part is not
            found.add_trial(optuna.trial.create_trial(params=each.params, distributions=each.distributions, value=each.intermediate_values[epoch]))
    return found, epoch


def evaluator(seed: int = 0) -> optuna.importance.FanovaImportanceEvaluator:
    """What computes importances, in tables and pictures: functional ANOVA."""
    return optuna.importance.FanovaImportanceEvaluator(seed=seed)


def importances(study: optuna.Study, objective: int = 0, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Each field's share of the variance of an objective (fANOVA), and the number of trials that it is computed from.

    A field that only some trials draw is measured among those, beside the fields that all have.

    Raises:
        ValueError: fewer than ``FEWEST`` trials have finished, or all have the same value.
    """
    ended = [each for each in study.trials if each.state == TrialState.COMPLETE]
    if len(ended) < FEWEST:
        raise ValueError(f"{len(ended)} trials have finished, but {FEWEST} are needed to compare fields")
    every = list({name: None for each in ended for name in each.params})
    drawn = {name: [each for each in ended if name in each.params] for name in every}
    common = [name for name in every if len(drawn[name]) == len(ended)]

    def shares(names: list[str], trials: list[FrozenTrial]) -> dict[str, float]:
        if len({each.values[objective] for each in trials}) < 2:
            raise ValueError(f"the {len(trials)} trials all have the same value: no field matters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator(seed), params=names, target=lambda each: each.values[objective]))

    found = {name: (share, len(ended)) for name, share in shares(common, ended).items()}
    for name in every:
        if name not in common and len(drawn[name]) >= FEWEST:
            found[name] = shares([*common, name], drawn[name])[name], len(drawn[name])
    return dict(sorted(found.items(), key=lambda each: -each[1][0]))


def explain(config: Explain) -> dict[str, Any]:
    """Print how much each field of a search matters."""
    folder = to_path(config.storage) / config.explain
    if not (folder / "search.json").is_file():
        raise ValueError(f"no search {config.explain!r} in {config.storage}")
    given = runs.read_json(folder / "search.json")["given"]
    names = str(given.get("objective", "information")).split(",")
    storage = config.study_storage or given.get("study_storage") or study_in(folder)
    study = open_study(storage, folder.name, [maximised(name) for name in names], "random", 0)
    trials, epoch = compared(study)
    found = {name: importances(trials, number) for number, name in enumerate(names)}
    for name, shares in found.items():
        print(f"{name} of {config.explain}{f' after epoch {epoch}, to which all trials came' if epoch else ''}: share of its variance, from so many trials")
        for each, (share, count) in shares.items():
            print(f"  {each:<24}{share:>7.3f}{count:>6}")
    return {"study": config.explain, "importances": {name: {each: share for each, (share, _) in shares.items()} for name, shares in found.items()}}
