"""The same commands as Ray jobs, from a clone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.console.cli import main
from tests.servers import ROOT, Head


@pytest.fixture
def submit(
    ray_cluster: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:  # fmt: skip
    """Runs a command of hashbridge as a job of a clone; returns status, output and errors."""
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(tmp_path / "clone")], check=True)
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.delenv("RAY_ADDRESS")

    def run(arguments: str) -> tuple[int, str, str]:
        line = ["submit", "--address", f"http://127.0.0.1:{ray_cluster.dashboard}", "--python", sys.executable, "--", *arguments.split()]
        for _ in range(20):  # the head answers some seconds before it takes jobs
            try:
                status = main(line)
            except SystemExit as ended:  # with the failed job's status
                status = int(ended.code or 0)
            shown = capfd.readouterr()
            if "No available agent" not in shown.err:
                break
            time.sleep(2)
        return status, shown.out, shown.err

    return run


def test_train_and_tune_as_jobs_from_a_clone(submit: Callable[[str], tuple[int, str, str]], few_digits: Path, tmp_path: Path) -> None:
    shared = f"dah --dataset {few_digits} --source typeset --target handwritten --bits 16 --per-class 4 --epochs 1 --steps-per-epoch 3 --tracking none --json"
    status, out, err = submit(f"train {shared} --workers 0 --no-plots --storage {tmp_path}/runs")
    assert status == 0 and '"run_id"' in out, out + err
    assert json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["epochs"] == 1
    status, out, err = submit(f"tune {shared} --trials 1 --threads 1 --study j --storage {tmp_path}/searches")
    assert status == 0 and '"complete": 1' in out and (tmp_path / "searches" / "j" / "results" / "best.yaml").is_file(), out + err


def test_jobs_that_cannot_be(submit: Callable[[str], tuple[int, str, str]], ray_cluster: Head) -> None:
    status, out, err = submit("methods --config /nowhere.yaml")
    assert status == 2 and "cannot be read" in err and "job " not in err  # seen before anything is uploaded
    status, out, err = submit("evaluate none --dataset /nowhere --storage /nowhere")
    assert status == 2 and "hashbridge:" in out  # the job's status and its logs
    Path("large.bin").write_bytes(bytes(101 << 20))
    status, out, err = submit("methods")
    assert status == 2 and "the upload would be" in err and "large.bin (101.0 MiB)" in err
    Path("large.bin").unlink()
    line = [sys.executable, "-m", "pipelines", "submit", "--address", f"http://127.0.0.1:{ray_cluster.dashboard}", "--", "methods"]
    unknown = subprocess.run(line, env=os.environ | {"RAY_AUTH_TOKEN": "wrong" * 10}, capture_output=True, text=True, timeout=180, check=False)
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr and "wrongwrong" not in unknown.stderr
