"""The same commands as Ray jobs, from a clone, on a head of their own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.servers import ROOT, free_port, wait_for

TOKEN = "a-token-of-this-test-" + "0" * 32
RAY = str(Path(sys.executable).parent / "ray")


def submit(arguments: str, dashboard: int, clone: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command of hashbridge as a job of the clone."""
    command = [sys.executable, "-m", "pipelines", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--python", sys.executable, "--"]
    for _ in range(20):  # the head answers some seconds before it takes jobs
        done = subprocess.run([*command, *arguments.split()], cwd=clone, env=environment, capture_output=True, text=True, timeout=180, check=False)
        if "No available agent" not in done.stderr:
            break
        time.sleep(2)
    return done


@pytest.mark.skipif(not Path(RAY).exists(), reason="the ray command is not installed")
def test_train_and_tune_as_jobs_from_a_clone(digits: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(clone)], check=True)
    dashboard, short = free_port(), tempfile.mkdtemp(prefix="hb")  # a socket's path may have 107 characters
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port(), "ray-client-server-port": free_port()}
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1", f"--temp-dir={short}", "--disable-usage-stats",
         *(f"--{name}={port}" for name, port in ports.items())],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    shared = f"dah --dataset {digits} --source typeset --target handwritten --bits 16 --per-class 4 --epochs 1 --steps-per-epoch 3 --tracking none --json"
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", TOKEN)
        trained = submit(f"train {shared} --no-plots --storage {tmp_path}/runs", dashboard, clone, environment)
        tuned = submit(f"tune {shared} --trials 2 --concurrency 2 --threads 1 --study j --storage {tmp_path}/searches", dashboard, clone, environment)
        failed = submit("methods --config /nowhere.yaml", dashboard, clone, environment)
        nowhere = submit("evaluate none --dataset /nowhere --storage /nowhere", dashboard, clone, environment)
        unknown = submit("methods", dashboard, clone, environment | {"RAY_AUTH_TOKEN": "wrong" * 10})
        (clone / "large.bin").write_bytes(bytes(101 << 20))
        large = submit("methods", dashboard, clone, environment)
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(30)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["epochs"] == 1
    assert '"run_id"' in trained.stdout
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert failed.returncode == 2 and "cannot be read" in failed.stderr and "job " not in failed.stderr  # seen before anything is uploaded
    assert nowhere.returncode == 2 and "hashbridge:" in nowhere.stdout  # the job's status and its logs
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr and "wrongwrong" not in unknown.stderr
    assert large.returncode == 2 and "the upload would be" in large.stderr and "large.bin (101.0 MiB)" in large.stderr
    assert '"complete": 2' in tuned.stdout and (tmp_path / "searches" / "j" / "results" / "best.yaml").is_file()
