"""The same commands as Ray jobs, from a clone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.servers import ROOT, Head


def submit(arguments: str, dashboard: int, clone: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command of hashbridge as a job of the clone."""
    command = [sys.executable, "-m", "pipelines", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--python", sys.executable, "--"]
    for _ in range(20):  # the head answers some seconds before it takes jobs
        done = subprocess.run([*command, *arguments.split()], cwd=clone, env=environment, capture_output=True, text=True, timeout=180, check=False)
        if "No available agent" not in done.stderr:
            break
        time.sleep(2)
    return done


def test_train_and_tune_as_jobs_from_a_clone(ray_cluster: Head, digits: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(clone)], check=True)
    dashboard, environment = ray_cluster.dashboard, {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    shared = f"dah --dataset {digits} --source typeset --target handwritten --bits 16 --per-class 4 --epochs 1 --steps-per-epoch 3 --tracking none --json"
    trained = submit(f"train {shared} --no-plots --storage {tmp_path}/runs", dashboard, clone, environment)
    tuned = submit(f"tune {shared} --trials 2 --concurrency 2 --threads 1 --study j --storage {tmp_path}/searches", dashboard, clone, environment)
    failed = submit("methods --config /nowhere.yaml", dashboard, clone, environment)
    nowhere = submit("evaluate none --dataset /nowhere --storage /nowhere", dashboard, clone, environment)
    unknown = submit("methods", dashboard, clone, environment | {"RAY_AUTH_TOKEN": "wrong" * 10})
    (clone / "large.bin").write_bytes(bytes(101 << 20))
    large = submit("methods", dashboard, clone, environment)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["epochs"] == 1
    assert '"run_id"' in trained.stdout
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert failed.returncode == 2 and "cannot be read" in failed.stderr and "job " not in failed.stderr  # seen before anything is uploaded
    assert nowhere.returncode == 2 and "hashbridge:" in nowhere.stdout  # the job's status and its logs
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr and "wrongwrong" not in unknown.stderr
    assert large.returncode == 2 and "the upload would be" in large.stderr and "large.bin (101.0 MiB)" in large.stderr
    assert '"complete": 2' in tuned.stdout and (tmp_path / "searches" / "j" / "results" / "best.yaml").is_file()
