"""The command line: help, configuration, and bad input: one line, exit status 2, nothing left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.console import cli
from pipelines.console.cli import COMMANDS, main


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder of wrong files."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "half" / "cat").mkdir(parents=True)
    (tmp_path / "half" / "dog").mkdir()
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.arange(4))
    (tmp_path / "half" / "cat" / "a.png").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "odd.npz", a=np.zeros(3))
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "wrong.yaml").write_text("bitz: 64\n")
    (tmp_path / "tag.yaml").write_text("bits: !!python/object/apply:os.system ['true']\n")
    return tmp_path


TRAIN = "train dah --dataset {digits} --source typeset --target handwritten --storage {bad}/runs --tracking none --workers 0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "did you mean train?"),
        ("train daah", "did you mean 'dah'?"),
        ("train", "METHOD is missing"),
        ("train dah --source a", "--dataset is missing"),
        (TRAIN + " --mdm-weight 1", "did you mean --mmd-weight?"),
        (TRAIN + " --bits 12", "multiple of 8"),
        (TRAIN + " --bits 4096", "multiple of 8"),
        (TRAIN + " --bits many", "must be a whole number"),
        (TRAIN + " --epochs 0", "at least 1"),
        (TRAIN + " --like-weight -1", "must not be negative"),
        (TRAIN + " --like-weight nan", "must be a number"),
        (TRAIN + " --optimizer adamm", "did you mean adam?"),
        (TRAIN + " --source typset", "has no domain 'typset'"),
        (TRAIN + " --target typeset", "source and target are both 'typeset'"),
        (TRAIN + " --workers 3", "do not divide over 3 workers"),
        (TRAIN + " --per-class 0", "too small"),
        (TRAIN + " --network mlp", "does not take data of shape"),
        (TRAIN + " --config {bad}/list.yaml", "must be a mapping"),
        (TRAIN + " --config {bad}/wrong.yaml", "no option --bitz: did you mean --bits?"),
        (TRAIN + " --config {bad}/tag.yaml", "cannot be read"),
        (TRAIN + " --config {bad}/none.yaml", "cannot be read"),
        (TRAIN + " --resume nothing", "no run 'nothing'"),
        (TRAIN.replace("--tracking none", "--tracking http://127.0.0.1:9"), "does not answer"),
        (TRAIN.replace("{bad}/runs", "/proc/nowhere"), ""),
        ("train dah --dataset {bad}/empty --source a --target b", "has no manifest.json"),
        ("train dah --dataset {bad}/gone --source a --target b", "does not exist"),
        ("ingest {bad}/gone --dataset {bad}/set", "no file, folder or catalogue entry"),
        ("ingest digitz --dataset {bad}/set", "did you mean 'digits'?"),
        ("ingest digits", "--dataset is missing"),
        ("ingest digits --domain hand --dataset {bad}/set", "has no domain 'hand'"),
        ("ingest {bad}/empty --dataset {bad}/set", "is empty"),
        ("ingest {bad}/hollow --dataset {bad}/set", "no image file"),
        ("ingest {bad}/half --dataset {bad}/set", "no row can be read; the first is 'cat/a.png' (empty file)"),
        ("ingest {bad}/text.npz --dataset {bad}/set", "not a readable .npz"),
        ("ingest {bad}/odd.npz --dataset {bad}/set", "no x_<split> array"),
        ("ingest {bad}/file.txt --dataset {bad}/set", "is not `path label`"),
        ("ingest {bad}/x.npz --dataset {bad}/set --size 4", "from 8 to 2048"),
        ("ingest office31 --dataset {bad}/set", "give its path as office31=FOLDER"),
        ("ingest office31={bad}/half --dataset {bad}/set", "lacks the domain folder amazon"),
        ("ingest digits --dataset {digits}", "already has domain"),
        ("evaluate nothing", "no run 'nothing'"),
        ("evaluate r --query a/b", "belong together"),
        ("evaluate r --query a/train --database a/train", "must not find itself"),
        ("register nothing --name n", "no run 'nothing'"),
        ("register nothing --name a#b", "must consist of letters"),
        ("register nothing --name a/b", "must consist of letters"),
        (TRAIN.replace("--tracking none", "").replace("/runs", "/r?x"), "which a database's address cannot contain"),
        ("ingest {bad}/x.npz --dataset {bad}/set --domain a/b", "cannot name a domain"),
        ("ingest {bad}/x.npz --dataset {bad}/set --range 9-1", "must be LOW-HIGH"),
        ("encode nothing {bad} --out {bad}/codes", "no run 'nothing'"),
        ("encode nothing {bad}/gone --out {bad}/codes", "no file or folder"),
        ("encode nothing {bad} --out {bad}/empty", "exists already"),
        ("index {bad}/empty --out {bad}/i", "no codes at"),
        ("index {bad}/empty --out {bad}/i --kind tree", "must be one of flat, hnsw, ivf"),
        ("search {bad}/file.txt {bad} ", "no index at"),
        ("methods none", "no method 'none'"),
    ],
)
def test_bad_input_is_one_line(line: str, said: str, bad: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path for path in bad.rglob("*") if path.name != "runs"}
    status = main(line.format(bad=bad, digits=digits).split())
    shown = capsys.readouterr()
    messages = [text for text in shown.err.splitlines() if text.startswith("hashbridge: ")]
    assert status == 2
    assert len(messages) == 1 and said in messages[0], shown.err
    assert "Traceback" not in shown.err + shown.out
    assert {path for path in bad.rglob("*") if path.name != "runs"} == before


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[name] in shown and "--config" in shown


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("bits: 32\nepochs: 3\nmmd-weight: 0.5\nsource: a\ntarget: b\ndataset: d\n")
    config = cli.parse(["train", "dah", "--config", str(tmp_path / "c.yaml"), "--bits", "16"])[1]
    assert (config.bits, config.epochs, config.own["mmd_weight"]) == (16, 3, 0.5)


def test_the_paper_preset_takes_overrides() -> None:
    from models.methods.dah import DAH

    config = cli.parse(["train", "dah", "--preset", "paper", "--dataset", "d", "--source", "a", "--target", "b", "--mmd-weight", "7"])[1]
    assert config.own == vars(DAH.preset("paper")) | {"mmd_weight": 7.0} and config.epochs == 300


@pytest.mark.parametrize("name", ["methods", "datasets"])
def test_json_is_the_last_line_of_standard_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--json"]) == 0
    shown = capsys.readouterr()
    assert set(json.loads(shown.out.splitlines()[-1])) >= ({"dah"} if name == "methods" else {"digits"})
    assert shown.err
