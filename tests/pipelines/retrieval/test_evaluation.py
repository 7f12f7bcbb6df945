"""Evaluation with missing labels, with another class order, and of what cannot be measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.manifest import Manifest
from pipelines import evaluate, ingest, register, train
from pipelines.console.cli import main
from pipelines.retrieval.evaluation import evaluate_run, retrieval_metrics, trained_labels
from pipelines.retrieval.metrics import Encoded

CLASSES = [str(name) for name in range(10)]


def encoded(labels: np.ndarray, name: str, seed: int = 0) -> Encoded:
    codes = np.random.default_rng(seed).integers(0, 256, (len(labels), 2), dtype=np.uint8)
    return Encoded(codes, labels, name)


def digits(root: Path, split: dict[str, tuple[np.ndarray, np.ndarray]], name: str, classes: list[str] = CLASSES) -> None:
    """Ingest arrays of digits as a domain."""
    file = root.parent / f"{name}-{root.name}.npz"
    arrays = {f"{axis}_{part}": value for part, pair in split.items() for axis, value in zip("xy", pair, strict=True)}
    np.savez(file, classes=np.array(classes), **arrays)  # type: ignore[arg-type]
    ingest.run(ingest.Config(str(file), dataset=str(root), domain=name))


def trained(root: Path, storage: Path, seed: int = 0) -> dict[str, Any]:
    return train.run(train.make_config({
        "method": "igan", "dataset": str(root), "source": "a", "target": "b", "bits": 16, "per_class": 4, "epochs": 1, "steps_per_epoch": 6,
        "adversarial_weight": 0, "l1_weight": 0, "workers": 0, "threads": 1, "tracking": "none", "plots": False, "storage": str(storage), "seed": seed,
    }))  # fmt: skip


def rows(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    from data.digits import read

    return read("typeset", split, 0, count)


def test_what_is_left_out_is_counted() -> None:
    query = encoded(np.array([0, 1, -1, 9]), "b/test")
    database = encoded(np.array([0, 1, 1, -1, -1]), "a/train", 1)
    figures, notes = retrieval_metrics(query, database)
    assert 0 < figures["map"] <= 1
    assert notes == [
        "2 of 5 rows of database a/train have no label and are left out",
        "2 of 4 queries of b/test have no label or no relevant row and are left out",
    ]


def test_labels_are_matched_by_class_name() -> None:
    assert trained_labels(["a", "b", "c"], ["c", "x", "a"], np.array([0, 1, 2, -1])).tolist() == [2, -1, 0, -1]


def test_another_datasets_class_order_does_not_change_the_accuracy(tmp_path: Path) -> None:
    images, labels = rows("train", 400)
    other = CLASSES[::-1]
    for root, classes, known in ((tmp_path / "set", CLASSES, labels), (tmp_path / "other", other, 9 - labels)):
        digits(root, {"train": (images, known)}, "a", classes)
        digits(root, {"train": (images[:200], known[:200]), "test": (images[200:], known[200:])}, "b", classes)
    result = trained(tmp_path / "set", tmp_path / "runs")
    folder = tmp_path / "runs" / result["run_id"]
    again = evaluate_run(folder, tmp_path / "other", Manifest.read(tmp_path / "other"), plots=False)["metrics"]
    assert again["accuracy"] == result["metrics"]["accuracy"] > 0.15
    assert again["cross/map"] == pytest.approx(result["metrics"]["cross/map"])


def test_one_target_image_of_a_class_is_a_note_and_the_run_is_kept(tmp_path: Path) -> None:
    images, labels = rows("train", 200)
    digits(tmp_path / "set", {"train": (images, labels)}, "a")
    digits(tmp_path / "set", {"train": (images[:10], labels[:10])}, "b")
    result = trained(tmp_path / "set", tmp_path / "runs")
    assert "cross/map" in result["metrics"] and "target/map" not in result["metrics"]
    assert any(note.startswith("target: not measured: no query has a relevant code") for note in result["notes"])
    assert register.run(register.Config(result["run_id"], name="street", storage=str(tmp_path / "runs")))["version"] == 1


def test_a_dataset_that_was_written_anew_is_not_resumed_with(tmp_path: Path) -> None:
    images, labels = rows("train", 200)
    for name in ("a", "b"):
        digits(tmp_path / "set", {"train": (images, labels)}, name)
    result = trained(tmp_path / "set", tmp_path / "runs")
    ingest.run(ingest.Config(str(tmp_path / "b-set.npz"), dataset=str(tmp_path / "set"), domain="b", replace=True, limit=100))
    with pytest.raises(ValueError, match="has changed since run .* began"):
        train.run(train.make_config({"resume": result["run_id"], "storage": str(tmp_path / "runs"), "epochs": 2}))


def test_several_runs_give_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    digits(root, {"train": rows("train", 200)}, "a")
    digits(root, {"train": rows("train", 200), "test": rows("test", 100)}, "b")
    names = [trained(root, tmp_path / "runs", seed)["run_id"] for seed in (0, 1)]

    def measured(model: str) -> dict[str, Any]:
        return evaluate.run(evaluate.Config(model, storage=str(tmp_path / "runs"), query="b/test", database="a/train"))

    one, other = (measured(name)["metrics"]["b/test in a/train/map"] for name in names)
    capsys.readouterr()
    found = measured(",".join(names))
    assert one != other and found["metrics"]["b/test in a/train/map"] == pytest.approx((one + other) / 2)
    assert found["deviations"]["b/test in a/train/map"] == pytest.approx(abs(one - other) / 2**0.5)
    assert "mean of 2 (standard deviation):" in capsys.readouterr().out


def test_an_index_is_not_searched_with_a_run_that_was_trained_on_since(few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(tmp_path / "runs")
    line = ["train", "dah", "--dataset", str(few_digits), "--source", "typeset", "--target", "handwritten", "--storage", storage, "--tracking", "none",
            "--workers", "0", "--threads", "1", "--epochs", "1", "--steps-per-epoch", "2", "--per-class", "2", "--network", "lenet", "--no-plots"]  # fmt: skip
    assert main([*line, "--json"]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    query, encoded = f"{few_digits}#handwritten/test#0", ["encode", str(few_digits), "--domain", "typeset", "--split", "test", "--out"]
    for name, given, more in (("path", f"{storage}/{run}", []), ("i", run, ["--storage", storage])):
        assert main([encoded[0], given, *encoded[1:], str(tmp_path / f"{name}-codes"), *more]) == 0
        assert main(["index", str(tmp_path / f"{name}-codes"), "--out", str(tmp_path / name)]) == 0
        assert main(["search", str(tmp_path / name), query, *more]) == 0  # a run that was given by its path is found by it
    asked = ["search", str(tmp_path / "i"), query, "--storage", storage]
    assert main(asked) == 0 and main([*asked, "--model", run]) == 0
    assert main(["train", "--resume", run, "--storage", storage, "--epochs", "2"]) == 0
    for more in ([], ["--model", run]):
        capsys.readouterr()
        assert main([*asked, *more]) == 2
        error = capsys.readouterr().err
        assert run in error and "epoch-00001" in error and "epoch-00002" in error and error.count("\n") == 1
