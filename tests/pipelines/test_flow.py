"""The whole pipeline on the embedded digits, and the registered encoder in a process with only mlflow and torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.decoding import read_decoded
from data.manifest import Manifest
from pipelines import encode, evaluate, index, ingest, parts, promote, register, search, train
from pipelines.console.cli import main
from pipelines.registry.encoders import found_by_workers
from pipelines.retrieval.code_files import read_codes
from pipelines.training.restore import load_method

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short real run of DAH with tracking, and its paths."""
    storage = tmp_path_factory.mktemp("runs")
    config = train.make_config({
        "method": "dah", "dataset": str(digits), "source": "typeset", "target": "handwritten", "bits": 32, "per_class": 10, "epochs": 4,
        "steps_per_epoch": 40, "storage": str(storage), "workers": 0,
    })  # fmt: skip
    return train.run(config) | {"storage": str(storage), "digits": digits}


@pytest.fixture(scope="module")
def champion(trained: dict[str, Any]) -> str:
    """The run's encoder, registered and promoted."""
    register.run(register.Config(trained["run_id"], name="digits", storage=trained["storage"]))
    assert promote.run(promote.Config("digits", storage=trained["storage"]))["promoted"]
    return "models:/digits@champion"


def test_a_short_run_is_well_above_chance(trained: dict[str, Any]) -> None:
    figures = trained["metrics"]
    assert figures["accuracy"] > 0.4 and figures["cross/map"] > 0.4 and figures["target/map"] > 0.4
    assert not trained["oracle"] and trained["images_per_second"] > 0
    plots = Path(trained["storage"]) / trained["run_id"] / "plots"
    for name in ("precision_recall.png", "codes_tsne.png", "retrievals.png"):
        with Image.open(plots / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors(256)) > 20


def test_the_run_is_tracked(trained: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained['storage']}/mlflow.db")
    experiment = client.get_experiment_by_name("hashbridge")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.info.status == "FINISHED" and run.data.params["mmd_weight"] == "1.0" and run.data.params["bits"] == "32"
    assert run.data.metrics["accuracy"] == pytest.approx(trained["metrics"]["accuracy"])
    assert len(client.get_metric_history(run.info.run_id, "loss/hash")) == 4
    manifest = Manifest.read(trained["digits"])
    assert [each.dataset.digest for each in run.inputs.dataset_inputs] == [manifest.digest()]
    assert {each.path for each in client.list_artifacts(run.info.run_id, "plots")} >= {"plots/retrievals.png"}


def test_evaluation_of_run_and_model_agree(trained: dict[str, Any], champion: str) -> None:
    from_run = evaluate.run(evaluate.Config(trained["run_id"], storage=trained["storage"], protocol="target"))["metrics"]
    config = evaluate.Config(champion, dataset=str(trained["digits"]), storage=trained["storage"], protocol="target")
    from_model = evaluate.run(config)["metrics"]
    assert from_run["target/map"] == pytest.approx(trained["metrics"]["target/map"], abs=1e-12)
    assert from_model["target/map"] == pytest.approx(from_run["target/map"], abs=1e-6)
    assert "accuracy" in from_run


def test_any_two_splits_can_be_measured(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = f"evaluate {trained['run_id']} --storage {trained['storage']} --query handwritten/test --database typeset/test"
    assert main(line.split()) == 0
    assert "handwritten/test in typeset/test map 0." in capsys.readouterr().out


def test_a_fresh_process_gives_the_codes_that_encode_wrote(trained: dict[str, Any], champion: str, tmp_path: Path) -> None:
    digits, out = trained["digits"], tmp_path / "codes"
    encode.run(encode.Config(champion, str(digits), out=str(out), domain="handwritten", split="test", storage=trained["storage"]))
    manifest = Manifest.read(digits)
    x = torch.cat([part.x for part in read_decoded(digits, manifest, "handwritten", "test")])
    np.save(tmp_path / "x.npy", x.numpy())
    script = (
        "import sys, numpy as np, mlflow; "
        f"mlflow.set_tracking_uri('sqlite:///{trained['storage']}/mlflow.db'); "
        f"model = mlflow.pyfunc.load_model('{champion}'); x = np.load('{tmp_path}/x.npy'); "
        f"np.save('{tmp_path}/found.npy', np.concatenate([model.predict(x[i:i+100]) for i in range(0, len(x), 100)])); "
        "print(sorted({'ray', 'models', 'data', 'pipelines'} & set(sys.modules)))"
    )
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path / "empty", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    table, written, _ = read_codes(out)
    assert np.array_equal(np.load(tmp_path / "found.npy"), written)
    assert len(table) == 500 and len(set(table["id"].to_pylist())) == 500


def test_the_version_says_what_it_is(trained: dict[str, Any], champion: str) -> None:
    from pipelines.registry.versions import version_tags

    found = version_tags(f"sqlite:///{trained['storage']}/mlflow.db", "digits", "champion")
    assert found is not None
    tags = found[1]
    assert {tags[name] for name in ("method", "bits", "source", "target", "protocol")} == {"dah", "32", "typeset", "handwritten", "cross+target"}
    assert tags["dataset_digest"] == Manifest.read(trained["digits"]).digest()
    assert float(tags["metric.target.map"]) == pytest.approx(trained["metrics"]["target/map"], abs=1e-5)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_search_finds_what_brute_force_finds(kind: str, trained: dict[str, Any], champion: str, tmp_path: Path) -> None:
    digits, out = trained["digits"], tmp_path / "codes"
    encode.run(encode.Config(trained["run_id"], str(digits), out=str(out), domain="typeset", split="test", storage=trained["storage"]))
    index.run(index.Config(str(out), out=str(tmp_path / "i"), kind=kind, lists=1 if kind == "ivf" else 0))
    config = search.Config(str(tmp_path / "i"), f"{digits}#handwritten/test#3-6", champion, 5, str(tmp_path / "grid.png"), trained["storage"])
    found = search.run(config)["queries"]
    assert len(found) == 4 and all(len(each["answers"]) == 5 for each in found)
    assert {answer["class"] for each in found for answer in each["answers"]} <= set("0123456789") and all(each["class"] for each in found)
    _, database, _ = read_codes(out)
    encoder = load_method(Path(trained["storage"]) / trained["run_id"], Manifest.read(digits))
    x = search.load_queries(f"{digits}#handwritten/test#3-6", (1, 32, 32))[1]
    import torch

    from models.codes import pack

    with torch.no_grad():
        wanted = pack(encoder.encode(torch.from_numpy(x))).numpy()
    for query, each in zip(wanted, found, strict=True):
        nearest = sorted(np.bitwise_count(database ^ query).sum(1).tolist())[:5]
        distances = [answer["distance"] for answer in each["answers"]]
        assert distances == nearest if kind != "hnsw" else sum(distances) <= sum(nearest) + 2  # a graph's search is approximate
    assert (tmp_path / "grid.png").stat().st_size > 5000


def test_a_run_given_by_its_path_is_found_by_processes_with_another_working_folder(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, run = Path(trained["storage"]), str(trained["run_id"])
    monkeypatch.chdir(storage.parent)
    for given, found in {
        f"{storage.name}/{run}": f"{storage}/{run}", f"{storage.name}/{run}@epoch-00004": f"{storage}/{run}@epoch-00004",
        "models:/digits/1": "models:/digits/1", "": "",
    }.items():  # fmt: skip
        assert found_by_workers(given, "elsewhere") == found
    assert found_by_workers(run, storage.name) == run  # --storage has it
    with pytest.raises(ValueError, match="no run 'nothing' in elsewhere"):
        found_by_workers("nothing", "elsewhere")


def test_what_a_killed_encoder_left_is_not_among_the_codes(trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(source: Path, target: Path) -> None:
        (source / ".1-part-00000.parquet").write_bytes(b"PAR1 and no more")
        moved(source, target)

    moved = encode.move
    monkeypatch.setattr(encode, "move", left)
    digits, storage = str(trained["digits"]), trained["storage"]
    encode.run(encode.Config(trained["run_id"], digits, out=str(tmp_path / "c"), domain="handwritten", split="test", storage=storage))
    assert len(read_codes(tmp_path / "c")[0]) == 500


def test_a_folder_of_images_is_encoded_and_searched(trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(np.full((40, 30, 3), number * 40, np.uint8)).save(folder / f"{number}.png")
    (folder / "torn.png").write_bytes(b"\x89PNG")
    storage = trained["storage"]
    assert main(["encode", trained["run_id"], str(folder), "--out", str(tmp_path / "codes"), "--storage", storage, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["codes"] == 6 and len(result["rejected"]) == 1 and "torn.png" in result["rejected"][0]
    table = pq.read_table(tmp_path / "codes")
    assert table["id"].to_pylist() == [f"{number}.png" for number in range(6)]
    assert main(["index", str(tmp_path / "codes"), "--out", str(tmp_path / "i")]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "i"), str(folder / "2.png"), "-k", "1", "--storage", storage, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["queries"][0]["answers"][0]
    assert answer["distance"] == 0


def test_domains_that_were_ingested_one_by_one_keep_ids_of_their_own(few_digits: Path, tmp_path: Path) -> None:
    for domain in ("typeset", "handwritten"):
        parquet = pq.read_table(few_digits / f"domain={domain}" / "split=test")
        assert set(parquet["id"].to_pylist()) == {f"x_test/{number}" for number in range(60)}
    run = train.run(train.make_config({
        "method": "lsh", "dataset": str(few_digits), "target": "handwritten", "bits": 16, "workers": 0, "storage": str(tmp_path), "tracking": "none",
        "plots": False,
    }))["run_id"]  # fmt: skip
    encode.run(encode.Config(run, str(few_digits), out=str(tmp_path / "codes"), split="test", storage=str(tmp_path)))
    ids = pq.read_table(tmp_path / "codes")["id"].to_pylist()
    assert sorted(ids) == sorted(f"{domain}/x_test/{number}" for domain in ("typeset", "handwritten") for number in range(60))


def test_parts_decoded_elsewhere_give_the_same_codes(trained: dict[str, Any], tmp_path: Path) -> None:
    """What decoding tasks hand to encoding actors on GPU nodes."""
    for number in range(3):
        Image.fromarray(np.full((40, 30, 3), number * 40, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.full((40, 30), 0.5, np.float32)).save(tmp_path / "1.tiff")
    for path, item in (
        (str(trained["digits"]), {"part": 3, "split": "typeset/test", "start": 100, "stop": 900, "files": ""}),
        (str(tmp_path), {"part": 3, "split": "", "start": 0, "stop": 0, "files": json.dumps(["0.png", "torn.png", "1.tiff", "2.png"])}),
    ):
        told = []
        for name in ("here", "apart"):
            coder = encode._Encode(encode.Config(trained["run_id"], path, out="", storage=trained["storage"]), str(tmp_path / name))
            told.append(coder(parts.Decode(path, coder.encoder.shape)(item) if name == "apart" else item))
        here, apart = (pq.read_table(tmp_path / name / "part-00003.parquet") for name in ("here", "apart"))
        assert told[0] == told[1] and here.equals(apart) and len(here) == told[0]["codes"] > 0
    assert "torn.png" in told[0]["lost"] and told[0]["whites"] == "[1.0]"


def test_promotion_refuses_the_worse_and_the_incomparable(trained: dict[str, Any], champion: str) -> None:
    from pipelines.registry.connection import connect

    uri, storage = f"sqlite:///{trained['storage']}/mlflow.db", trained["storage"]
    register.run(register.Config(trained["run_id"], name="digits", storage=storage))
    decision = promote.run(promote.Config("digits", storage=storage))
    assert not decision["promoted"] and decision["champion"] == 1
    connect(uri).set_model_version_tag("digits", str(decision["challenger"]), "dataset_digest", "another")
    with pytest.raises(ValueError, match="dataset_digest"):
        promote.run(promote.Config("digits", storage=storage))


def test_runs_of_other_settings_do_not_resume(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "dpsh", "--resume", trained["run_id"], "--storage", trained["storage"]]
    assert main(arguments) == 2
    assert "is of dah with 32 bits, not of dpsh" in capsys.readouterr().err


def test_features_go_the_same_way(shared_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "office"
    for domain in ("dslr", "webcam"):
        assert main(["ingest", str(shared_data / f"office_caltech10_{domain}.npz"), "--dataset", str(root), "--domain", domain]) == 0
    config = train.make_config({
        "method": "dah", "dataset": str(root), "source": "webcam", "target": "dslr", "epochs": 1, "steps_per_epoch": 40, "workers": 0,
        "storage": str(tmp_path / "runs"), "tracking": "none",
    })  # fmt: skip
    result = train.run(config)
    assert result["metrics"]["accuracy"] > 0.8 and result["metrics"]["target/map"] > 0.5
    assert any("left out of its own ranking" in note for note in result["notes"])


def test_files_of_twelve_bits_are_encoded_and_searched_with_a_range(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values >> 4).astype(np.uint8)).save(tmp_path / "flat.png")
    item = {"split": "", "start": 0, "stop": 0, "files": json.dumps(["deep.png", "flat.png"])}
    (dark,), (light,) = ([*parts.Decode(str(tmp_path), (1, 16, 16), 0, given).batches(item)] for given in (None, (0.0, 4095.0)))
    assert dark.ids == ["flat.png"] and "deep.png: its brightest value is 4095 of 65535" in dark.lost[0]
    assert light.ids == ["deep.png", "flat.png"] and not light.lost and np.abs(light.x[0].astype(int) - light.x[1]).max() <= 1
    assert np.array_equal(search.load_queries(str(tmp_path), (1, 16, 16), (0.0, 4095.0)).x, light.x)
    assert search.load_queries(str(tmp_path), (1, 16, 16)).names == [str(tmp_path / "flat.png")]


def test_float_files_that_differ_in_what_is_white_are_neither_encoded_nor_searched(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder, storage = tmp_path / "scans", trained["storage"]
    folder.mkdir()
    for number, brightest in enumerate((1.0, 1.0, 255.0)):
        Image.fromarray(np.linspace(0, brightest, 256, dtype=np.float32).reshape(16, 16)).save(folder / f"{number}.tiff")
    said = "float or 32-bit images differ in what their brightest value makes white: 1 for 2, 255 for 1: give --range LOW-HIGH for all"
    assert main(["encode", trained["run_id"], str(folder), "--out", str(tmp_path / "codes"), "--storage", storage]) == 2
    assert said in capsys.readouterr().err and [each.name for each in tmp_path.iterdir()] == ["scans"]
    with pytest.raises(ValueError, match=said):
        search.load_queries(str(folder), (1, 16, 16))
    (folder / "2.tiff").unlink()
    assert main(["encode", trained["run_id"], str(folder), "--out", str(tmp_path / "codes"), "--storage", storage]) == 0
    assert len(search.load_queries(str(folder), (1, 16, 16)).x) == 2


def test_a_target_of_bare_image_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(48):
        place = tmp_path / ("bare" if number % 2 else f"known/{'abcd'[number % 8 // 2]}")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(place / f"{number}.png")
    for name in ("bare", "known"):  # the one without labels first
        ingest.run(ingest.Config(str(tmp_path / name), dataset=str(tmp_path / "set"), size=28, channels=1))
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.classes == ["a", "b", "c", "d"]
    assert (manifest.split("bare", "train").unlabelled, manifest.split("bare", "train").labels) == (24, [0] * 4)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = train.run(train.make_config({
        "method": "dah", "dataset": str(tmp_path / "set"), "source": "known", "target": "bare", "bits": 16, "epochs": 1, "steps_per_epoch": 3,
        "per_class": 3, "workers": 0, "storage": str(tmp_path / "runs"), "tracking": uri,
    }))  # fmt: skip
    assert result["metrics"] == {} and "has no labels" in result["notes"][0]
    assert (tmp_path / "runs" / result["run_id"] / "plots" / "retrievals.png").stat().st_size > 1000
    register.run(register.Config(result["run_id"], name="bare", storage=str(tmp_path / "runs"), tracking=uri))
    assert promote.run(promote.Config("bare", tracking=uri))["promoted"]
    register.run(register.Config(result["run_id"], name="bare", storage=str(tmp_path / "runs"), tracking=uri))
    with pytest.raises(ValueError, match="was not measured"):
        promote.run(promote.Config("bare", tracking=uri))
