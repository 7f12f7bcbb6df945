"""Trials that pause and go on: which, what a sampler sees of them, and that a trial that went on is what it would have been at once."""

import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from pipelines.console.cli import main
from pipelines.registry.connection import EXPERIMENT, connect
from pipelines.training import runs
from pipelines.training.launch import train
from pipelines.training.options import TrainOptions
from pipelines.training.plan import make_plan, prepare
from tests.servers import Head
from tests.tuning.test_search import line, trials
from tuning.pausing import PausedSampler, Pauses, Pausing
from tuning.study import CONTINUES, recover, sampler_of


def none(epoch: int) -> bool:
    """No trial will come to a pause."""
    return False


def some(epoch: int) -> bool:
    """Trials will come to every pause."""
    return True


def test_the_best_third_goes_on_and_in_the_end_three() -> None:
    pauses = Pauses(epochs=8, maximise=False)
    assert [*pauses.values] == [2, 4] and [*Pauses(2, True).values] == [1] and [*Pauses(3, True).values] == [1]
    for number, value in enumerate((0.5, 0.9)):
        pauses.add(2, number, value)
    assert pauses.next(some) is None
    pauses.add(2, 2, math.nan)
    assert pauses.next(some) == (2, 0) and pauses.next(some) is None
    for number, value in enumerate((0.2, 0.7, 0.6), 3):
        pauses.add(2, number, value)
    assert pauses.next(some) == (2, 3) and pauses.next(some) is None  # two of six; the other one of these went on before
    assert pauses.waits()
    assert pauses.next(lambda epoch: epoch > 2) == (2, 5)  # three, as no more come to the first pause
    assert pauses.next(none) is None and not pauses.waits()
    for number, value in ((6, 0.4), (7, 0.3), (8, 0.1), (9, 0.8)):  # the parts of 0, 3 and 5 that went on, and one more
        pauses.add(4, number, value)
    assert [pauses.next(some) for _ in range(2)] == [(4, 8), None]
    assert [pauses.next(none) for _ in range(3)] == [(4, 7), (4, 6), None]


def test_a_trial_that_never_is_a_number_never_goes_on() -> None:
    pauses = Pauses(epochs=8, maximise=True)
    for number in range(4):
        pauses.add(2, number, math.nan)
    assert pauses.next(none) is None and not pauses.waits()


def test_a_trial_goes_on_at_once_if_it_is_good_enough_and_that_of_the_defaults_always() -> None:
    pauses, decided = Pauses(epochs=4, maximise=True), []
    rule = Pausing(pauses, "information")
    for number in range(6):
        trial = SimpleNamespace(config={"number": number, "spared": number == 0})
        assert rule.on_trial_result(None, trial, {"epoch": 3, "information": 9.0}) == TrialScheduler.CONTINUE  # without a pause
        decided.append(rule.on_trial_result(None, trial, {"epoch": 1, "information": float(number)}))
    assert [number for number, each in enumerate(decided) if each == TrialScheduler.CONTINUE] == [0, 2, 3, 4, 5]
    assert pauses.gone[1] == {0, 2, 3, 4, 5}


def test_a_sampler_sees_paused_trials_with_their_values_and_each_configuration_once() -> None:
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate((0.5, 0.9, 0.2)):
        asked = study.ask()
        asked.suggest_float("x", 0, 1)
        asked.report(value, 1)
        study.tell(asked, state=TrialState.PRUNED)
        assert asked.number == number
    study.enqueue_trial(study.trials[1].params, user_attrs={CONTINUES: 1})
    goes_on = study.ask()
    goes_on.suggest_float("x", 0, 1)
    study.tell(goes_on, 1.0)
    seen = PausedSampler(optuna.samplers.TPESampler(), {1})._seen(study)
    assert [(each.number, each.state.name, each.value) for each in seen.trials] == [(0, "COMPLETE", 0.5), (2, "COMPLETE", 0.2), (3, "COMPLETE", 1.0)]
    assert [each.state.name for each in study.trials] == ["PRUNED"] * 3 + ["COMPLETE"]  # the study itself is not changed
    assert seen.get_trials(states=(TrialState.RUNNING,)) == []
    found = Pauses(epochs=4, maximise=True)
    found.recall(study.trials, {1})
    assert found.gone[1] == {1} and [found.next(none) for _ in range(3)] == [(1, 0), (1, 2), None]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sampler_learns_from_paused_trials(sampler: str) -> None:
    study = optuna.create_study(direction="maximize", sampler=PausedSampler(sampler_of(sampler, 0), set()))
    drawn = []
    for _ in range(40):  # all of which pause
        asked = study.ask()
        drawn.append(asked.suggest_float("x", 0, 1))
        asked.report(-((drawn[-1] - 0.8) ** 2), 1)
        study.tell(asked, state=TrialState.PRUNED)
    assert sum(abs(x - 0.8) < 0.1 for x in drawn[20:]) > 10  # a fifth of them by chance


def test_a_search_that_was_killed_before_a_trial_went_on_keeps_its_first_part(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    paused = study.ask()
    paused.suggest_float("x", 0, 1)
    paused.report(1.0, 1)
    study.tell(paused, state=TrialState.PRUNED)
    (tmp_path / "trial-0000" / "checkpoints").mkdir(parents=True)
    study.enqueue_trial(study.trials[0].params, user_attrs={CONTINUES: 0})
    study.ask()  # and then it was killed
    assert recover(study, tmp_path, ["information"]) == 0
    assert [each.state.name for each in study.trials] == ["PRUNED", "FAIL", "WAITING"] and study.trials[2].user_attrs == {CONTINUES: 1}
    assert (tmp_path / "trial-0001" / "checkpoints").is_dir() and not (tmp_path / "trial-0000").exists()
    pauses = Pauses(epochs=4, maximise=True)
    pauses.recall(study.trials, {0, 1})
    assert pauses.values[1] == {0: 1.0} and not pauses.waits()


def test_a_trial_that_went_on_is_what_it_would_have_been_at_once(ray_cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    assert main(line(few_digits, tmp_path, "--study", "paused", "--epochs", 4, "--trials", 5)) == 0
    folder, rows = tmp_path / "paused", trials(tmp_path, "paused")
    check(rows, folder, 5)
    went_on = folder / f"trial-{max(row['number'] for row in rows):04d}"
    options = TrainOptions(**runs.options(runs.read_config(went_on)))
    setup, seen = prepare(options), list[dict[str, float]]()
    train(replace(make_plan(setup, lambda: 1), folder=str(tmp_path / "at once")), setup, lambda record, method: seen.append(record["terms"]), {})
    assert seen == [json.loads(each)["terms"] for each in (went_on / "progress.jsonl").read_text().splitlines()]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    children = [run for run in client.search_runs([experiment]) if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == 5  # a trial that went on has one run
    ended = [run for run in children if run.info.status == "FINISHED"]
    assert len(ended) == sum(row["status"] == "complete" for row in rows)
    assert {run.info.run_name for run in children} == {f"paused-{row['number']:04d}" for row in rows}
    told = io.StringIO()
    with redirect_stdout(told):
        assert main(["tune", "--study", "paused", "--storage", str(tmp_path), "--resume", "--trials", "7", "--json"]) == 0
    assert json.loads(told.getvalue().splitlines()[-1])["trials"]["complete"] >= 3
    extended = trials(tmp_path, "paused")
    check(extended, folder, 7)
    assert all(row in extended for row in rows if row["status"] == "complete")


def check(rows: list[dict[str, Any]], folder: Path, count: int) -> None:
    """So many trials, each configuration once, all values in Optuna's study; of those at each pause at least the best three went on, and the defaults."""
    assert len(rows) == len({row["mmd_weight"] for row in rows}) == count
    seen: dict[int, list[dict[str, Any]]] = {}
    known = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}").trials
    for row in rows:
        seen[row["number"]] = [json.loads(each) for each in (folder / f"trial-{row['number']:04d}" / "judged.jsonl").read_text().splitlines()]
        assert [each["epoch"] for each in seen[row["number"]]] == [1, 2, 3, 4][: row["epoch"]]
        assert row["status"] == ("complete" if row["epoch"] == 4 else "stopped early") and row["epoch"] != 3
        told = known[row["number"]].intermediate_values
        assert told and told == {each["epoch"]: each["information"] for each in seen[row["number"]][-len(told) :]}  # from a pause on, or all
        assert max(told) == row["epoch"] and (min(told) == 1) == (CONTINUES not in known[row["number"]].user_attrs)
    for epoch in (1, 2):
        came = sorted((number for number, records in seen.items() if len(records) >= epoch), key=lambda number: -seen[number][epoch - 1]["information"])
        assert all(len(seen[number]) > epoch for number in [0, *came[:3]])
