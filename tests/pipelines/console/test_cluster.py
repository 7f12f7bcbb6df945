"""The environment of Ray's workers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.console import cluster
from tests.servers import ROOT, Head

SEEN = """
import os
from pipelines.console import cli, cluster
cli.set_default_environment()
ray = cluster.connect()
print("spins", ray.get(ray.remote(lambda: os.environ.get("GOMP_SPINCOUNT")).remote()))
"""


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_the_users_own_policy_of_waiting_threads_is_kept(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(each, raising=False)
    assert cluster.spin_limit() == {"GOMP_SPINCOUNT": cluster.SPINS}
    monkeypatch.setenv(name, value)
    assert cluster.spin_limit() == {}


def test_workers_of_a_running_cluster_limit_their_spinning_threads(ray_cluster: Head) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SEEN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert f"spins {cluster.SPINS}" in done.stdout, done.stderr[-2000:]


def test_a_cluster_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "PATIENCE", 0.1)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"no Ray cluster answers at RAY_ADDRESS='{address}': "):
            cluster.connect()


@pytest.mark.parametrize("runs", [True, False])
def test_a_cluster_of_this_machine_that_nobody_named_is_not_used(
    runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Ray writes its address to a file, which stays when the cluster is killed."""
    asked: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address, **options: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if runs:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        cluster.connect()
    assert asked == ["local"] and capsys.readouterr().err.count(f"RAY_ADDRESS={address} would use") == runs


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "gpu", "threads"),
    [
        ((8, 8), (0, 0), 1, False, 8), ((8, 8), (0, 0), 2, False, 8), ((8, 8), (0, 0), 3, False, 4), ((2, 16), (0, 0), 2, False, 8),
        ((0, 4), (0, 0), 9, False, 1), ((2, 16, 32), (0, 4, 4), 2, True, 4), ((2, 1), (0, 2), 1, True, 1), ((4,), (0,), 1, True, 1),
    ],
)  # fmt: skip
def test_workers_have_as_many_threads_as_their_nodes_have_cores_for(
    cpus: tuple[float, ...], gpus: tuple[float, ...], workers: int, gpu: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "resources", lambda name: [*map(float, cpus if name == "CPU" else gpus)])
    assert cluster.threads_each(workers, gpu) == threads
    assert not gpu or cluster.room("GPU", 0.5) == 2 * sum(gpus)
