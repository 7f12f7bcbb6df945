"""The first trials of a search, the shares of its fields, and the knee of a front."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from models.registry import METHODS, find_method
from pipelines.registry.search_tracking import SearchTracker
from pipelines.training import runs
from tuning.explain import compared, importances
from tuning.report import draw, knee, ranked
from tuning.space import space_of
from tuning.start import first_trials


def firsts(asked: str, method: str = "dah", given: dict[str, Any] | None = None, storage: str = "runs", search_bits: bool = False) -> dict[str, dict[str, Any]]:
    kind = find_method(method)
    own = asdict(kind.Config())
    return first_trials(asked, space_of(kind, own, given or {}, set(), 64, search_bits), kind, own, 64, storage, "information")


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if not each.fitted])
def test_the_defaults_and_the_papers_setting_are_first(method: str) -> None:
    kind = find_method(method)
    found = firsts("default,paper", method)
    default = asdict(kind.Config())
    space = space_of(kind, default, {}, set(), 64, False)
    for name, value in found["default"].items():
        low, high = space.searched[name].low, space.searched[name].high
        assert value == min(max(default[name], low), high)
    assert list(found) in (["default"], ["default", "paper"]) and found.get("paper") != found["default"]
    study = optuna.create_study()
    for values in found.values():
        study.enqueue_trial(values)
    assert [space(study.ask()) for _ in found] == list(found.values())  # Optuna draws what is queued


def test_none_bits_and_narrowed_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    firsts("default,paper")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("first trial paper: moved into the space's bounds: ") and "mmd_weight 5000.0 to 100" in line
    assert firsts("none") == {}
    assert firsts("default", search_bits=True)["default"]["bits"] == 64
    given = {"bits": [16, 32], "mmd_weight": {"low": 900.0, "high": 1000.0, "log": False}}
    assert {name: firsts("default", given=given)["default"][name] for name in ("bits", "mmd_weight")} == {"bits": 16, "mmd_weight": 900.0}  # moved into it


def test_the_best_of_the_last_searches_in_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    kind = find_method("dah")
    own = asdict(kind.Config())
    space = space_of(kind, own, {}, set(), 64, False)

    def found() -> dict[str, dict[str, Any]]:
        return first_trials("mlflow", space, kind, own, 64, str(tmp_path), "information", uri)

    with pytest.raises(ValueError, match="has no finished trial of a search of dah by information"):
        found()
    for search in range(5):
        shared = {"method": "igan" if search == 4 else "dah", "objective": "entropy" if search == 3 else "information", "dataset_digest": "1"}
        tracker = SearchTracker(uri, f"s{search}", shared)
        for number, value in enumerate((0.5, 2.0, 1.0, 3.0)):
            tracker.begin(number, {"mmd_weight": 0.1 * (search + 1) + number, "per_class": 10 + number, "weight_decay": 1e-05})
            tracker.epoch(number, 1, {"information": value})
            tracker.end(number, "KILLED" if number == 3 else "FINISHED")
    assert list(found()) == ["mlflow: s2-0001", "mlflow: s1-0001", "mlflow: s0-0001"]
    values = found()["mlflow: s1-0001"]
    assert values["mmd_weight"] == pytest.approx(1.2) and values["per_class"] == 11 and values["weight_decay"] == 1e-05 and values["dropout"] == own["dropout"]
    with pytest.raises(ValueError, match="--tracking is none"):
        firsts("mlflow")


def test_other_searches_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    (folder / "results").mkdir(parents=True)
    runs.write_json(folder / "search.json", {"given": {"method": "dah"}})
    with pytest.raises(ValueError, match="no results yet"):
        firsts("before", storage=str(tmp_path))
    rows = [{"number": n, "status": "complete" if n else "failed", "information": float(n % 4) if n else None, "mmd_weight": 0.1 * (n + 1)} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "results" / "trials.parquet")
    found = firsts("default, before", storage=str(tmp_path))
    assert list(found) == ["default", "before: trial 3", "before: trial 2", "before: trial 1"]
    assert [round(each["mmd_weight"], 6) for each in list(found.values())[1:]] == [0.4, 0.3, 0.2]
    assert firsts(str(folder)) == {name.replace("before", str(folder)): each for name, each in found.items() if name != "default"}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"method": "dah", "dataset": "x", "mmd_weight": 0.7}))
    assert next(iter(firsts(str(tmp_path / "best.yaml")).values()))["mmd_weight"] == 0.7
    for text, said in (
        ("method: igan", "is of method igan"), ("mmd_weight: much", "must be a number"), ("mmd_weight: .nan", "must be a number"),
        ("- 3", "must be a mapping"), ("[", "cannot be read"),
    ):  # fmt: skip
        (tmp_path / "best.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            firsts(str(tmp_path / "best.yaml"))
    with pytest.raises(ValueError, match="is of method dah, the search of igan"):
        firsts(str(folder), "igan")


def test_shares_of_fields() -> None:
    """Of 3a + b the first field has nine tenths of the variance; a field that is drawn with a large a alone is measured there."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def value(trial: optuna.Trial) -> float:
        a, b, c = trial.suggest_float("a", 0, 1), trial.suggest_float("b", 0, 1), trial.suggest_float("c", 0, 1)
        return 3 * a + b + 0 * c + (trial.suggest_float("d", 0, 1) if a > 0.5 else 0)

    with pytest.raises(ValueError, match="0 trials have finished"):
        importances(study)
    same = optuna.create_study()
    same.optimize(lambda trial: trial.suggest_float("a", 0, 1) * 0, 5)
    with pytest.raises(ValueError, match="the 5 trials all have the same value"):
        importances(same)
    study.optimize(value, 150)
    found = importances(study)
    assert list(found)[0] == "a" and found["a"][0] > 0.6 and found["b"][0] > found["c"][0] and found["c"][0] < 0.05
    assert found["a"][1] == 150 and 40 < found["d"][1] < 110 and found["d"][0] > found["c"][0]
    assert sum(share for name, (share, _) in found.items() if name != "d") == pytest.approx(1)


def halving() -> optuna.Study:
    """Eight trials of four epochs, of which the first five ended after two."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(8):
        trial = study.ask()
        trial.suggest_float("a", 0, 1)
        trial.suggest_float("b", 0, 1)
        for epoch in range(1, (2 if number < 5 else 4) + 1):
            trial.report(10.0 * epoch + number, epoch)
        study.tell(trial, *((None, optuna.trial.TrialState.PRUNED) if number < 5 else (40.0 + number,)))
    return study


def test_trials_that_ended_early_are_compared_where_all_came_to() -> None:
    study = halving()
    found, epoch = compared(study)
    assert epoch == 2 and [each.value for each in found.trials] == [20.0 + number for number in range(8)]
    assert [each.params for each in found.trials] == [each.params for each in study.trials]
    whole = optuna.create_study()
    whole.optimize(lambda trial: trial.suggest_float("a", 0, 1), 3)
    assert compared(whole) == (whole, 0)


def test_the_pictures_show_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances are those of ``--explain``; each slice has a point for each trial; the history has a line for the best so far."""
    from matplotlib import pyplot  # noqa: PLC0415

    shown: dict[str, Any] = {}

    def look(file: Path, **options: Any) -> None:
        file.touch()
        axis, first = pyplot.gca(), pyplot.gcf().axes[0]
        bars, points = [bar.get_width() for bar in axis.patches], [len(each.get_offsets()) for each in first.collections[:1]]
        label = axis.get_legend_handles_labels()[1] or [first.get_ylabel()]
        shown[file.stem.rpartition("-")[2]] = (bars, points, len(axis.lines), label)

    monkeypatch.setattr(pyplot, "savefig", look)
    study = halving()
    draw(study, ["information"], tmp_path)
    assert sorted(shown["importances"][0], reverse=True) == pytest.approx([share for share, _ in importances(compared(study)[0]).values()])
    assert shown["importances"][3] == ["information after epoch 2"] and shown["slices"][1] == [8]
    assert shown["history"][1:] == ([3], 1, ["information", "Best Value"])


def test_the_knee_and_the_ranks() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    points = [(1.0, 16), (2.0, 32), (2.1, 64), (2.2, 128)]
    for quality, bits in points:
        study.add_trial(optuna.trial.create_trial(values=[quality, bits]))
    front = sorted(study.best_trials, key=lambda each: each.values[1])
    found = knee(study, front)
    assert found is not None and found.values == [2.0, 32] and knee(study, front[:2]) is None
    dented = optuna.create_study(directions=["maximize", "minimize"])
    for quality, bits in ((1.0, 16), (1.1, 96), (2.2, 128)):  # the middle lies before the line between the ends: there is no knee
        dented.add_trial(optuna.trial.create_trial(values=[quality, bits]))
    assert len(dented.best_trials) == 3 and knee(dented, dented.best_trials) is None
    single = optuna.create_study(direction="maximize")
    spread = {"x": optuna.distributions.FloatDistribution(0, 9)}
    for value, x in ((1.0, 1.0), (3.0, 2.0), (2.0, 2.0), (2.5, 3.0)):
        single.add_trial(optuna.trial.create_trial(value=value, params={"x": x}, distributions=spread))
    assert [each.value for each in ranked(single)] == [3.0, 2.5, 1.0]
