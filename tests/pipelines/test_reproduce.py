"""The papers' tables: their figures as printed, the trials that they ask for, and the report."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from data.manifest import Manifest
from pipelines import reproduce, train
from pipelines.console.cli import main
from pipelines.reproduction import report
from pipelines.reproduction.cosine import by_cosine, mean_average_precision, unit_rows
from pipelines.reproduction.report import Line, Place, plain_name, verdict
from pipelines.reproduction.reuse import result_of
from pipelines.reproduction.tables import NEAREST, TABLES, Row, find_tables
from pipelines.reproduction.trials import DataSet, Shared, Trial, _train, datasets
from pipelines.retrieval.metrics import Encoded
from tests.servers import Head

PRINTED = {  # the averages that the papers print beside their rows
    ("dah", 2): {"GFK": 62.32, "TCA": 64.54, "CORAL": 66.04, "JDA": 69.37, "DAN": 72.13, "DANN": 75.15, "DAH-e": 72.31, "DAH": 73.04},
    ("dah", 3): {"GFK": 32.40, "TCA": 30.34, "CORAL": 37.91, "JDA": 36.97, "DAN": 43.46, "DANN": 44.94, "DAH-e": 42.69, "DAH": 45.54},
    ("dah", 4): {"source-only (NoDA)": 27.8, "ITQ": 37.0, "KMeans": 32.2, "BA": 30.1, "BDNN": 38.2, "DAH": 48.0, "SuH (oracle)": 70.7},
    ("igan", 1): {"MSTN": 92.30, "CDAN-M": 94.30, "ADDA": 85.17, "DRCN": 82.50, "Co-GAN": 90.15, "IGAN": 96.73},
    ("igan", 2): {"MSTN": 69.38, "CDAN-M": 67.30, "ADDA": 63.30, "IGAN": 70.85},
    ("igan", 3): {"source-only (NoDA)": 44.90, "ITQ": 58.67, "BDNN": 60.50, "BA": 44.80, "DAH": 67.33, "IGAN": 69.87, "SuH (oracle)": 90.80},
}
SHARED = Shared("runs", 1, 2, 1, 1)


@pytest.mark.parametrize("table", PRINTED, ids=lambda table: f"{table[0]}-{table[1]}")
def test_figures_have_the_averages_that_the_papers_print(table: tuple[str, int]) -> None:
    rows = {row.name: row for row in find_tables(*table)[0].rows}
    for name, printed in PRINTED[table].items():
        assert abs(statistics.mean(rows[name].figures.values()) - printed) < 0.11, name  # dah, table 4 prints three digits


def test_idr_aes_tables_agree_where_they_name_the_same() -> None:
    """And its own row is the best of each column, as printed in bold."""
    for table in find_tables("idr-ae"):
        own = next(row for row in table.rows if row.own)
        assert own.name == "AE-IW" and all(own.figures[each] == max(row.figures[each] for row in table.rows) for each in table.columns())


@pytest.mark.parametrize("paper", TABLES)
def test_each_row_is_a_run_that_can_be_made(paper: str, digits: Path) -> None:
    (data,) = datasets(str(digits))
    for table in find_tables(paper):
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert all(0 < figure < 100 for figure in row.figures.values()) and (table.number or not row.figures)  # a table of ours has no paper's figures
            if row.method != NEAREST:
                pair = ("", "handwritten") if table.alone else ("typeset", "handwritten")
                options = Trial(row, "default", data, pair, 64, 0).options(SHARED)
                assert options.source == (pair[1] if row.oracle else pair[0])
                assert all(options.own[name] == row.settings[name] for name in options.own.keys() & row.settings)


def test_names_of_columns_are_told_apart_from_their_spelling() -> None:
    assert plain_name("Real_World -> Art") == plain_name("real world -> art") == "real world -> art"
    assert plain_name("art_painting") != plain_name("art")


def test_the_verdict_says_who_is_ahead() -> None:
    table = find_tables("dah", 4)[0]
    lines = [Line(Row(name, "dah", own=own, oracle=oracle), name, {"cross/map": values}) for name, own, oracle, values in (
        ("a", True, False, [0.5, 0.7]), ("b", False, False, [0.65]), ("c", False, True, [0.9]), ("d", True, False, []),
    )]  # fmt: skip
    assert verdict(table, lines) == "cross/map: a 60.0 is behind the best baseline, b 65.0."
    assert verdict(table, lines[:1]) == ""


def test_notes_of_the_runs_are_told_with_their_rows() -> None:
    row = Row("x", "dah")
    lines = [Line(row, name, {}, seconds=[1.0], notes=notes) for name, notes in (("a", ["left out"]), ("b", ["left out", "trained on", "trained on"]))]
    assert report._noted(lines) == ["Note (all rows): left out\n", "Note (b): trained on\n"]


def test_a_mean_needs_every_direction(digits: Path) -> None:
    table, row = find_tables("dah", 4)[0], Row("x", "dah", {"mean": 41.0})
    data = DataSet(digits, Manifest.read(digits))
    blocks = {Place(data, column, 64): [Line(row, "x", {"cross/map": values, "target/map": [0.1] * taken})] for column, values, taken in (
        ("a -> b", [0.2, 0.4], 2), ("b -> a", [0.4, 0.8], 1),
    )}  # fmt: skip
    mean = report.with_means(blocks, table)[Place(data, "mean of 2", 64)][0]
    assert mean.values == {"cross/map": pytest.approx([0.3, 0.6]), "target/map": []} and mean.paper == 41.0


@pytest.mark.parametrize("own", [False, True])
def test_cosine_map_is_scikit_learns(own: bool) -> None:
    draw = np.random.default_rng(0)
    rows, labels = unit_rows(draw.normal(size=(40, 6))), draw.integers(0, 4, 40)
    asked, wanted = (rows, labels) if own else (unit_rows(draw.normal(size=(9, 6))), draw.integers(0, 5, 9))  # class 4 is not in the database
    brute = []
    for place, query in enumerate(asked):
        kept = np.arange(40) != place if own else np.ones(40, bool)
        if (labels[kept] == wanted[place]).any():
            brute.append(average_precision_score(labels[kept] == wanted[place], rows[kept] @ query))
    found = mean_average_precision(Encoded(asked, wanted, "q"), Encoded(rows, labels, "d"), own)
    assert found == pytest.approx(np.mean(brute), abs=1e-6)


def test_rows_are_trained_once_and_written(
    few_digits: Path, tmp_path: Path, ray_cluster: Head, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As trials of Ray Tune; a second call goes on with the run that was cut off, trains nothing else, and writes the same."""
    monkeypatch.chdir(tmp_path)  # which is not the cluster's working folder
    given = {
        "paper": "igan", "table": 1, "data": str(few_digits), "pairs": "typeset:handwritten", "rows": "IGAN;DAN", "seeds": "0", "epochs": 1,
        "steps_per_epoch": 2, "storage": "runs",
    }  # fmt: skip
    first = reproduce.run(reproduce.Config(**given))
    assert "2 trials, of which 0 are there already" in capsys.readouterr().err
    lost = next((tmp_path / "runs" / "digits").glob("*DAN*/*/result.json"))
    lost.unlink()
    again = reproduce.run(reproduce.Config(**given, figures=True))
    told = capsys.readouterr()
    assert "2 trials, of which 1 are there already" in told.err and lost.is_file() and len([*lost.parent.parent.glob("dan-*")]) == 1
    assert [each | {"seconds": 0} for each in again["records"]] == [each | {"seconds": 0} for each in first["records"]]
    out = Path(again["out"])
    assert "**typeset -> handwritten**, 64 bits, seeds 0;" in told.out and "the best baseline, DAN" in told.out
    assert "Not at hand: svhn -> mnist, mnist -> usps, usps -> mnist" in (out / "tables.md").read_text()
    with (out / "tables.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [(row["row"], row["metric"], row["seeds"]) for row in rows] == [
        (name, metric, "1") for name in ("DAN", "IGAN") for metric in ("accuracy", "cross/map", "target/map")
    ]
    pictures = {str(each.relative_to(out)) for each in out.rglob("*.png")}
    place = "table-1/digits-typeset-handwritten-64"
    wanted = {"table-1.png", *(f"{place}/{name}.png" for name in ("precision_recall", "tsne", "retrievals-ours-IGAN", "retrievals-baseline-DAN"))}
    assert pictures == wanted and all((out / each).stat().st_size > 5000 for each in wanted)


def test_a_run_is_taken_again_if_options_and_data_are_the_same(few_digits: Path, tmp_path: Path) -> None:
    def result(**more: object) -> str:
        given = {"method": "lsh", "dataset": str(few_digits), "target": "typeset", "storage": str(tmp_path), "workers": 0, "tracking": "none", "plots": False}
        return str(result_of(train.make_config(given | more))["run_id"])

    first = result()
    assert result() == first != result(seed=1) and result(fit_rows=100) not in (first, result(seed=1))
    place = tmp_path / first / "result.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"dataset": "rows that have been replaced"}))
    assert result() != first


def test_a_row_that_diverges_is_told_and_not_tried_again(few_digits: Path, tmp_path: Path) -> None:
    options = train.make_config({
        "method": "igan", "dataset": str(few_digits), "source": "typeset", "target": "handwritten", "storage": str(tmp_path), "workers": 0, "tracking": "none",
        "plots": False, "epochs": 2, "steps_per_epoch": 3, "per_class": 2, "width": 4, "discriminator_rate": 1e30, "spectral": False, "pretrain_epochs": 0,
    })  # fmt: skip
    told = _train({"folder": "here"}, {"here": options})
    assert [*told] == ["failed"] and "not finite" in told["failed"]


def test_features_by_cosine_need_no_run(shared_data: Path, tmp_path: Path) -> None:
    from pipelines import ingest

    root = tmp_path / "office"
    for domain in ("dslr", "webcam"):
        ingest.run(ingest.Config(str(shared_data / f"office_caltech10_{domain}.npz"), domain=domain, dataset=str(root)))
    found = by_cosine(root, Manifest.read(root), ("webcam", "dslr"))
    assert 0.5 < found["cross/map"] < found["cross/cosine_precision_at_1"] <= 1 and found["cross/precision_at_5"] == found["cross/cosine_precision_at_5"]


@pytest.mark.parametrize(("words", "told"), [
    ("reproduce nothing --data x", "no paper 'nothing'"), ("reproduce dah --table 9 --data x", "dah has no table 9"), ("reproduce dah", "--data is missing"),
    ("reproduce dah --data {empty}", "no dataset in"), ("reproduce dah --data {digits} --rows DRCN", "no row 'DRCN'"),
    ("reproduce dah --data {digits} --pairs a:b", "the data have the domains"), ("reproduce dah --data {digits} --seeds one", "must be whole numbers"),
    ("reproduce dah --data {digits} --presets mine", "must be default, paper"), ("reproduce dah --data {digits} --bits 2000", "bits is 2000"),
    ("reproduce ucdir --table 1 --data {digits} --rows ID --presets paper --pairs typeset:typeset", "nothing to train"),
])  # fmt: skip
def test_wrong_options_get_one_line(words: str, told: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(digits=digits, empty=tmp_path).split()) == 2
    assert told in capsys.readouterr().err
