"""Searches: finished, extended, killed and resumed, with failing trials; and requests that are refused."""

import contextlib
import io
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from data.manifest import Manifest
from models.registry import find_method
from pipelines.console.cli import main
from tests.servers import ROOT, Head
from tuning.search import _pauses, _scheduler, make_config


def line(digits: Path, storage: Path, *more: object) -> list[str]:
    """A search of two short epochs on the embedded digits."""
    return [
        "tune", "dah", "--dataset", str(digits), "--source", "typeset", "--target", "handwritten", "--bits", "16", "--per-class", "4",
        "--epochs", "2", "--steps-per-epoch", "3", "--threads", "1", "--concurrency", "1", "--storage", str(storage), *map(str, more),
    ]  # fmt: skip


def trials(storage: Path, study: str) -> list[dict[str, Any]]:
    """The table of a search."""
    return pq.read_table(storage / study / "results" / "trials.parquet").to_pylist()


@pytest.fixture(scope="module")
def searched(ray_cluster: Head, few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a search of four trials, of which those with the wrong values fail."""
    storage = tmp_path_factory.mktemp("searches")
    space = storage / "space.yaml"
    space.write_text(
        yaml.safe_dump({"learning_rate": [0.002, 1e30], "dropout": [0.2, 5.0], "bits": [16, 32], "mmd_weight": {"low": 0.1, "high": 1.0}, "final_rate": 0.5})
    )
    drawn = ("--trials", 4, "--sampler", "random", "--start", "none", "--stop", "none", "--seed", 25)
    assert main(line(few_digits, storage, "--study", "s", "--space", space, *drawn, "--oracle", "--concurrency", 2)) == 0
    return storage


def test_failed_trials_are_recorded_and_the_search_goes_on(searched: Path) -> None:
    rows = trials(searched, "s")
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        wrong = row["learning_rate"] > 1 or row["dropout"] > 1
        assert (row["status"] == "failed") == wrong
        expected = "ValueError: dropout" if row["dropout"] > 1 else "FloatingPointError" if wrong else ""
        assert row["reason"].startswith(expected)
    reasons = [row["reason"] for row in rows if row["status"] == "failed"]
    assert len(reasons) == 2 and any("is not finite" in reason for reason in reasons)


def test_the_best_configuration_trains(searched: Path) -> None:
    ended = [row for row in trials(searched, "s") if row["status"] == "complete"]
    best = max(ended, key=lambda row: row["information"])
    given = yaml.safe_load((searched / "s" / "results" / "best.yaml").read_text())
    assert given["mmd_weight"] == best["mmd_weight"] and given["bits"] == best["bits"] and given["epochs"] == 2
    trained = json.loads((searched / "s" / f"trial-{best['number']:04d}" / "config.json").read_text())
    assert given["final_rate"] == trained["own"]["final_rate"] == 0.5 and trained["own"]["mmd_weight"] == best["mmd_weight"]  # fixed by the file, and drawn
    assert all(0 <= row["oracle/accuracy"] <= 1 for row in ended)
    assert {each.name for each in (searched / "s" / "results").iterdir()} >= {"history.png", "slices.png", "trials.csv"}


def test_the_search_and_its_trials_are_tracked(searched: Path) -> None:
    from pipelines.registry.connection import connect

    client = connect(f"sqlite:///{searched}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("hashbridge").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "s")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and parent.info.status == "FINISHED"
    ended = [child for child in children if child.info.status == "FINISHED"]
    assert ended and len(client.get_metric_history(ended[0].info.run_id, "information")) == 2
    assert {each.path for each in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "trials.csv", "trials.parquet"}


def test_a_search_is_not_begun_twice_and_few_trials_explain_nothing(few_digits: Path, searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(few_digits, searched, "--study", "s")) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["tune", "--explain", "s", "--storage", str(searched)]) == 2
    assert "trials have finished, but 4 are needed" in capsys.readouterr().err


def test_bits_against_quality_give_a_front_and_register_the_best(ray_cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    assert main(line(few_digits, tmp_path, "--study", "p", "--trials", 3, "--objective", "information,bits", "--register", "m", "--no-retrain")) == 0
    rows = trials(tmp_path, "p")
    assert {row["bits"] for row in rows} <= {16, 32, 64, 128} and all(row["status"] == "complete" for row in rows)
    assert (tmp_path / "p" / "results" / "pareto.png").stat().st_size > 5000
    from pipelines.registry import versions

    found = versions.version_tags(f"sqlite:///{tmp_path}/mlflow.db", "m", "challenger")
    best = max(rows, key=lambda row: row["information"])
    assert found is not None and int(found[1]["bits"]) == best["bits"]


def test_a_confirmed_winner_is_registered_and_promoted_in_one_command(ray_cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    more = ("--trials", 2, "--confirm", 2, "--finalists", 2, "--register", "m", "--promote", "--stop", "none", "--json")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(line(few_digits, tmp_path, "--study", "c", *more)) == 0
    told = json.loads(shown.getvalue().splitlines()[-1])
    rows = sorted(trials(tmp_path, "c"), key=lambda row: -row["information"])
    assert [row["number"] for row in trials(tmp_path, "c")] == [0, 1]
    first, default = trials(tmp_path, "c")[0], asdict(find_method("dah").Config())
    assert all(first[name] == default[name] for name in ("mmd_weight", "learning_rate", "entropy_weight"))  # the defaults are tried first
    values = {}
    for row in rows[:2]:
        places = [tmp_path / "c" / "confirmed" / f"seed-{seed}" / f"trial-{row['number']:04d}" for seed in (1, 2)]
        assert [json.loads((place / "config.json").read_text())["seed"] for place in places] == [1, 2]
        values[row["number"]] = [json.loads((place / "trial.json").read_text())["information"] for place in places]
    means = {number: sum(each) / 2 for number, each in values.items()}
    assert {each["trial"]: pytest.approx(each["mean"]) for each in told["confirmed"]} == means and told["trial"] == max(means, key=lambda each: means[each])
    deviations = {each["trial"]: each["deviation"] for each in told["confirmed"]}
    assert deviations == {number: pytest.approx(abs(a - b) / 2**0.5) for number, (a, b) in values.items()} and min(deviations.values()) > 0
    best = yaml.safe_load((tmp_path / "c" / "results" / "best.yaml").read_text())
    assert best["mmd_weight"] == next(row for row in rows if row["number"] == told["trial"])["mmd_weight"]
    assert len((tmp_path / "c" / "results" / "confirmed.csv").read_text().splitlines()) == 3
    from pipelines.registry import versions

    found = versions.version_tags(f"sqlite:///{tmp_path}/mlflow.db", "m", "champion")
    assert told["promoted"] and found is not None and found[0] == told["version"] and found[1]["run_id"] == told["run_id"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trial-workers", "64"], "the cluster's nodes have 2"),
        (["--concurrency", "9"], "9 trials at once need 9 CPUs"), (["--gpu"], "GPUs, but the cluster's nodes have 0"),
        (["--objective", "luck"], "no objective 'luck'"), (["--sampler", "dice"], "must be one of"), (["--trials", "0"], "at least 1"),
        (["--objective", "bits"], "must be one objective, or two"), (["--space", "nowhere.yaml"], "cannot be read"),
        (["--start", "nothing"], "names 'nothing', which is neither default, paper"), (["--start", "nowhere.yaml"], "cannot be read"),
        (["--confirm", "1"], "at least 2"), (["--confirm", "2", "--objective", "information,bits"], "needs one objective"),
        (["--promote"], "give --register NAME"), (["--explain", "nothing"], "no search 'nothing'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once(
    ray_cluster: Head, more: list[str], said: str, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(line(few_digits, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_objective_of_classes_needs_a_method_that_names_some(
    ray_cluster: Head, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    arguments = ["tune", "ucdir", "--dataset", str(few_digits), "--source", "typeset", "--target", "handwritten", "--storage", str(tmp_path), "--trials", "1"]
    assert main([*arguments, "--objective", "information"]) == 2
    assert "has none: use source-map" in capsys.readouterr().err
    manifest = Manifest.read(few_digits)
    bare = replace(manifest.split("typeset", "train"), labels=[0] * 10, unlabelled=400)
    splits = manifest.domains["typeset"].splits | {"train": bare}
    replace(manifest, domains=manifest.domains | {"typeset": replace(manifest.domains["typeset"], splits=splits)}).write(tmp_path / "bare")
    arguments[3] = str(tmp_path / "bare")
    assert main([*arguments, "--objective", "source-map"]) == 2
    assert "typeset has none: use balance" in capsys.readouterr().err


def test_a_trial_of_two_workers(ray_cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    arguments = line(few_digits, tmp_path, "--study", "w", "--trials", 1, "--epochs", 1, "--trial-workers", 2, "--tracking", "none")
    assert main(arguments) == 0
    (row,) = trials(tmp_path, "w")
    assert row["status"] == "complete" and row["information"] > 0 and row["start_up"] > 0
    assert json.loads((tmp_path / "w" / "trial-0000" / "config.json").read_text())["workers"] == 2


def test_a_killed_search_goes_on(ray_cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    searching = line(few_digits, tmp_path, "--study", "k", "--trials", 2, "--epochs", 4, "--stop", "none", "--tracking", "none")
    process = subprocess.Popen([sys.executable, "-m", "pipelines", *searching], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder, end = tmp_path / "k", time.monotonic() + 180
    while not list((folder / "trial-0001").glob("checkpoints/*")):
        assert process.poll() is None and time.monotonic() < end, "the search ended, or hung, before it could be killed"
        time.sleep(0.05)
    process.kill()
    for each in psutil.Process(ray_cluster.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ImplicitFunc" in " ".join(each.cmdline()):
                each.kill()  # the trial too: it would go on for some seconds, and end
    process.wait()
    finished = {each.parent.name: each.read_text() for each in folder.glob("*/trial.json")}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "tune", "--study", "k", "--storage", str(tmp_path), "--resume", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trial 1 was interrupted: it continues as another trial, from its last checkpoint" in done.stderr
    rows = trials(tmp_path, "k")
    assert len(rows) == 2 and all(row["status"] == "complete" and row["epoch"] == 4 for row in rows)
    assert list(finished) == ["trial-0000"] and (folder / "trial-0000" / "trial.json").read_text() == finished["trial-0000"]  # it was not trained again
    assert json.loads(done.stdout.splitlines()[-1])["trials"]["complete"] == 2


@pytest.mark.parametrize(("stop", "stopped"), [("asha", [1, 2, 3, 4]), ("median", [4])])
def test_what_stops_trials_early(stop: str, stopped: list[int]) -> None:
    from ray.tune.schedulers import TrialScheduler

    rule, controller, decided = _scheduler(searching(stop), None), SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")]), []
    for number in range(6):  # each worse than all before; the last is that of the defaults
        trial: Any = type("Trial", (), {"trial_id": str(number), "config": {"spared": number == 5}})()
        rule.on_trial_add(controller, trial)
        decided.append(rule.on_trial_result(controller, trial, {"epoch": 1, "training_iteration": 1, "information": 1 - number / 10}))
    assert [number for number, each in enumerate(decided) if each != TrialScheduler.CONTINUE] == stopped
    assert all(decided[number] == TrialScheduler.STOP for number in stopped)


def test_hyperband_begins_at_different_epochs_and_two_objectives_stop_nothing() -> None:
    found = {stop: [[epoch for epoch, _ in bracket._rungs] for bracket in _scheduler(searching(stop), None)._brackets] for stop in ("asha", "hyperband")}
    assert found == {"asha": [[3, 1]], "hyperband": [[3, 1], [3]]}
    assert _scheduler(searching("none"), None) is None and _scheduler(replace(searching("asha"), objective="information,bits"), None) is None


def test_trials_of_several_workers_do_not_pause() -> None:
    assert _pauses(searching("pause")) is not None
    assert [_pauses(replace(searching("pause"), **other)) for other in ({"trial_workers": 2}, {"epochs": 1}, {"objective": "information,bits"})] == [None] * 3
    several = replace(searching("pause"), trial_workers=2)
    assert [epoch for epoch, _ in _scheduler(several, _pauses(several))._brackets[0]._rungs] == [3, 1]


def searching(stop: str) -> Any:
    """Options of a search of four epochs."""
    return make_config({"method": "dah", "dataset": "set", "source": "a", "target": "b", "objective": "information", "epochs": 4, "stop": stop})
