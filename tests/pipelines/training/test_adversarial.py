"""IGAN, SIGAN and DTN on the embedded digits: trained, resumed, failing, translating, and in an ablation table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from pipelines import train, translate
from pipelines.console.cli import main
from pipelines.training import checkpoint
from tests.servers import Head

SMALL = {"source": "typeset", "target": "handwritten", "bits": 16, "per_class": 4, "epochs": 3, "steps_per_epoch": 4, "threads": 1, "width": 4}
OWN: dict[str, dict[str, Any]] = {"igan": {"stages": 2}, "sigan": {"pretrain_epochs": 1}, "dtn": {"pretrain_epochs": 1}}


def run(digits: Path, storage: Path, method: str, **more: Any) -> dict[str, Any]:
    """A short training."""
    options = {"workers": 0, "tracking": "none", "plots": False} | SMALL | OWN.get(method, {})
    return train.run(train.make_config({"method": method, "dataset": str(digits), "storage": str(storage)} | options | more))


@pytest.fixture(scope="module")
def shown(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of SIGAN with plots and tracking."""
    storage = tmp_path_factory.mktemp("shown")
    return run(digits, storage, "sigan", plots=True, tracking=f"sqlite:///{storage}/mlflow.db") | {"storage": storage}


def test_the_run_draws_and_logs_translations_after_each_epoch(shown: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    names = [f"plots/translations-{epoch:05d}.png" for epoch in (1, 2, 3)]
    for name in names:
        with Image.open(shown["storage"] / shown["run_id"] / name) as picture:
            assert len(picture.convert("L").getcolors(256)) > 20
    client = MlflowClient(f"sqlite:///{shown['storage']}/mlflow.db")
    experiment = client.get_experiment_by_name("hashbridge")
    assert experiment is not None
    tracked = client.search_runs([experiment.experiment_id])[0]
    assert {each.path for each in client.list_artifacts(tracked.info.run_id, "plots")} >= set(names)
    for term in ("label", "attention", "adversarial", "reconstruction", "variation", "critic", "penalty"):
        assert len(client.get_metric_history(tracked.info.run_id, f"loss/{term}")) == 2, term  # not while pretraining
    assert 0 <= shown["metrics"]["accuracy"] <= 1 and shown["metrics"]["target/map"] > 0.1


def test_translate_writes_each_image_and_a_grid(shown: dict[str, Any], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["translate", shown["run_id"], f"{digits}#typeset/test#0-19", "--out", str(tmp_path / "out"), "--storage", str(shown["storage"]), "--json"]
    assert main(line) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["images"]) == 20
    method, shape = translate.load_generator(shown["storage"] / shown["run_id"])
    assert shape == (1, 32, 32)
    x = translate.load_queries(f"{digits}#typeset/test#0-19", shape)[1]
    wanted = translate.translate_all(method, x)
    assert wanted.dtype == np.uint8 and wanted.shape == x.shape and wanted.std() > 0 and not np.array_equal(wanted, x)
    for file, image in zip(result["images"], wanted, strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), image[0])
    with Image.open(result["grid"]) as grid:
        assert min(grid.size) > 200


def test_translate_says_what_it_cannot(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = run(digits, tmp_path, "igan", epochs=1, adversarial_weight=0.0, l1_weight=0.0)["run_id"]
    for line, said in (
        (f"translate {run_id} {digits}#typeset/test#0-3 --out {tmp_path}/o --storage {tmp_path}", "has no generator"),
        (f"translate nothing {digits}#typeset/test#0-3 --out {tmp_path}/o --storage {tmp_path}", "no run 'nothing'"),
        (f"translate {run_id} {digits}#typeset/test#0-3 --storage {tmp_path}", "--out is missing"),
    ):
        assert main(line.split()) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


FAILED = "igan failed in epoch 3: loss .* is not finite.*checkpoints up to epoch 2 are kept"


def runs_away(digits: Path, tmp_path: Path, workers: int) -> None:
    """Train IGAN with a discriminator whose loss is soon not finite."""
    run(digits, tmp_path, "igan", workers=workers, pretrain_epochs=2, stages=1, discriminator_rate=1e30, spectral=False)


def last_good(tmp_path: Path) -> Path:
    """The run's last checkpoint, whose values are all finite."""
    place = checkpoint.latest(next(tmp_path.glob("igan-*")) / "checkpoints")
    assert place is not None
    assert all(tensor.isfinite().all() for tensor in load_file(place / "model.safetensors").values() if tensor.is_floating_point())
    return place


def test_a_discriminator_that_runs_away_ends_the_run_once_and_keeps_the_last_good_checkpoint(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=FAILED) as caught:
        runs_away(digits, tmp_path, workers=0)
    assert "\n" not in str(caught.value) and last_good(tmp_path).name == "epoch-00002"


def test_a_discriminator_that_runs_away_under_ray_is_not_started_again(ray_cluster: Head, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=FAILED) as caught:
        runs_away(digits, tmp_path, workers=1)
    assert "\n" not in str(caught.value) and last_good(tmp_path).name == "epoch-00002"


def test_sigan_translates_features_as_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for domain in ("one", "two"):
        np.savez(tmp_path / f"{domain}.npz", x_train=np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32), y_train=np.arange(40) % 4)
        assert main(["ingest", str(tmp_path / f"{domain}.npz"), "--dataset", str(tmp_path / "set")]) == 0
    line = f"train sigan --dataset {tmp_path}/set --source one --target two --workers 0 --tracking none --storage {tmp_path}/runs"
    assert main([*line.split(), *["--epochs", "2", "--pretrain-epochs", "1", "--steps-per-epoch", "2", "--per-class", "2", "--width", "2", "--bits", "8"]]) == 0
    run = next((tmp_path / "runs").iterdir()).name
    assert main(f"translate {run} {tmp_path}/set#one/train --out {tmp_path}/made --storage {tmp_path}/runs".split()) == 2
    assert "has no generator of images" in capsys.readouterr().err
