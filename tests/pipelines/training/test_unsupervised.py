"""IDR-AE, UCDIR and the classic hashes on the embedded digits: trained or fitted, measured, registered, searched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import evaluate, train
from pipelines.console.cli import main
from pipelines.retrieval import metrics

FITTED = ("lsh", "pca", "itq", "spectral", "kmeans-hash")
SMALL: dict[str, dict[str, Any]] = {
    "idr-ae": {"batch": 64, "width": 64},
    "ucdir": {"source": "typeset", "batch": 32, "cluster_start": 0.0, "cluster_full": 0.4},
}


def run(digits: Path, storage: Path, method: str, **more: Any) -> dict[str, Any]:
    """A short training, or a fit."""
    options = {
        "target": "handwritten", "bits": 32, "epochs": 3, "steps_per_epoch": 4, "threads": 1, "workers": 0, "tracking": "none", "plots": False,
    }  # fmt: skip
    given = {"method": method, "dataset": str(digits), "storage": str(storage)} | options | SMALL.get(method, {}) | more
    return train.run(train.make_config(given))


@pytest.mark.parametrize("method", FITTED)
def test_a_classic_hash_is_fitted_at_once_and_retrieves(method: str, few_digits: Path, tmp_path: Path) -> None:
    one = run(few_digits, tmp_path, method)
    assert one["metrics"]["target/map"] > 0.25 and not any(name.startswith(("cross", "accuracy")) for name in one["metrics"])
    assert one["epochs"] == 1 and one["run_id"].startswith(f"{method}-handwritten-32-") and not one["oracle"]
    again, both = run(few_digits, tmp_path, method), run(few_digits, tmp_path, method, source="typeset")
    assert again["metrics"] == one["metrics"]
    assert both["metrics"]["target/map"] != one["metrics"]["target/map"] and both["metrics"]["cross/map"] > 0.1


def test_ucdir_is_measured_by_its_features_too_and_in_both_directions(digits: Path, tmp_path: Path) -> None:
    result = run(digits, tmp_path, "ucdir")
    figures = result["metrics"]
    assert 0 < figures["cross/cosine_precision_at_50"] <= 1 and "target/cosine_precision_at_200" in figures and "accuracy" not in figures
    back = evaluate.run(evaluate.Config(result["run_id"], storage=str(tmp_path), query="typeset/test", database="handwritten/train"))["metrics"]
    assert {name.rpartition("/")[2] for name in back} >= {"map", "precision_at_200", "cosine_precision_at_200"}


def test_cosine_precision_is_the_sorted_one() -> None:
    random = np.random.default_rng(0)
    queries, database = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (random.normal(size=(9, 5)), random.normal(size=(120, 5))))
    labels, others = random.integers(0, 3, 9), random.integers(0, 3, 120)
    labels[0] = 7  # nothing is relevant to it
    wanted = [(others[np.argsort(-(database @ q))[:50]] == label).mean() for q, label in zip(queries[1:], labels[1:], strict=True)]
    found = metrics.cosine_precisions(queries, labels, database, others)
    assert found["precision_at_50"] == pytest.approx(np.mean(wanted)) and "precision_at_200" not in found
    alone = metrics.cosine_precisions(database, others, database, others, own=True)
    wanted = [(others[np.argsort(-(database @ q))[1:51]] == label).mean() for q, label in zip(database, others, strict=True)]
    assert alone["precision_at_50"] == pytest.approx(np.mean(wanted))


def test_what_cannot_be_trained_is_said(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        ("train ucdir --target handwritten", "--source is missing"),
        ("train itq --source handwritten --target handwritten", "source and target are both 'handwritten': leave --source out"),
        ("train itq --target handwritten --workers 2", "itq is fitted in one process, not trained by 2 workers"),
        ("train itq --target handwritten --extractor vgg16 --pretrained nowhere.pth", "weights 'nowhere.pth' of vgg16 cannot be loaded"),
        ("train idr-ae --target handwritten --matching best", "none, critic, assignment, bitwise"),
        ("train ucdir --source typeset --target handwritten --network mlp", "mlp takes features"),
        *([] if torch.cuda.is_available() else [("train dah --source typeset --target handwritten --gpu", "--gpu: torch finds no GPU on this machine")]),
    ):
        workers = "" if "--workers" in line else " --workers 0"
        assert main(f"{line}{workers} --dataset {digits} --tracking none --storage {tmp_path}/runs".split()) == 2
        assert said in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*"))


def test_a_fitted_encoder_is_registered_and_searched_like_the_rest(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = run(digits, tmp_path, "kmeans-hash", tracking=f"sqlite:///{tmp_path}/mlflow.db")["run_id"]
    model = "models:/classic@challenger"
    for line in (
        f"register {run_id} --name classic",
        f"encode {model} {digits} --domain handwritten --split train --out {tmp_path}/codes",
        f"index {tmp_path}/codes --out {tmp_path}/found.index",
        f"search {tmp_path}/found.index {digits}#handwritten/test#0-9 --model {model} -k 3 --json",
    ):
        storage = "" if line.startswith("index") else f" --storage {tmp_path}"
        assert main(f"{line}{storage}".split()) == 0, capsys.readouterr().err
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["queries"]
    assert len(answers) == 10 and all(len(each["answers"]) == 3 for each in answers)
