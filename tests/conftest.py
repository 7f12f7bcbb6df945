"""Shared fixtures: one Ray cluster and one prepared dataset for the whole session."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="1", RAY_worker_niceness="0")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray with two CPUs, for all tests of the session that need it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits, both domains, as a dataset."""
    from pipelines import ingest

    root = tmp_path_factory.mktemp("data") / "digits"
    ingest.run(ingest.Config("digits", dataset=str(root)))
    return root


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test skips where it is not there."""
    if not (SHARED / "usps.npz").exists():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m pipelines` in a process of its own."""

    def run(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ | environment, check=False,
        )  # fmt: skip

    return run
