"""Every path in a bucket, and buckets that do not answer, or do not let us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from tests.servers import BUCKET, S3, Tracking

ROOT = f"s3://{BUCKET}"
TRAIN = "train dah --source typeset --target handwritten --bits 16 --per-class 4 --epochs 2 --steps-per-epoch 10 --workers 0 --threads 1"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, Any]]:
    """Runs a command in this process; its result."""

    def run(line: str) -> dict[str, Any]:
        status = main([*line.split(), "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return json.loads(shown.out.splitlines()[-1])

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a command in this process, which must fail; the one line that it says."""

    def run(line: str) -> str:
        assert main(line.split()) == 2
        said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("hashbridge: ")]
        assert len(said) == 1
        return said[0]

    return run


def test_the_whole_way_in_a_bucket(
    s3: S3, ray_cluster: None, tracking_server: Tracking, command: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    data, runs = f"{ROOT}/way/digits", f"{ROOT}/way/runs"
    common = f"--dataset {data} --storage {runs}"
    ingested = command(f"ingest digits --dataset {data} --limit 600")
    assert ingested["domains"]["typeset"]["rows"]["train"] == 600
    trained = command(f"{TRAIN} {common}")
    assert trained["checkpoint"] == f"{runs}/{trained['run_id']}/checkpoints/epoch-00002"
    assert command(f"evaluate {trained['run_id']} --storage {runs}")["metrics"] == trained["metrics"]
    tuned = command(f"tune {TRAIN[6:]} {common} --trials 2 --no-asha --register best --no-retrain".replace("--workers 0 ", ""))
    assert tuned["trials"]["complete"] == 2 and tuned["results"].startswith(runs)
    registered = command(f"register {trained['run_id']} --name digits --storage {runs}")
    assert command(f"promote digits --storage {runs}")["promoted"]
    encoded = command(f"encode {registered['uri']} {data} --domain typeset --split train --out {ROOT}/way/codes")
    assert encoded["codes"] == 600
    command(f"index {ROOT}/way/codes --out {ROOT}/way/typeset.index")
    found = command(f"search {ROOT}/way/typeset.index {data}#typeset/train#3-4 --model {registered['uri']} -k 1 --grid {ROOT}/way/found.png")
    assert [query["answers"][0]["distance"] for query in found["queries"]] == [0, 0]
    assert not list(tmp_path.iterdir())
