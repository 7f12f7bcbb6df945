"""A tracking server that goes away while runs tell it of themselves."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import sync, train
from pipelines.outbox import Outbox, patiently
from tests.conftest import ROOT, free_port
from tests.pipelines.test_job import wait_for

PASSWORD = "a password of this test"


class Server:
    """MLflow's own server on loopback, with basic auth as in infra/mlflow, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        auth = (ROOT / "infra" / "mlflow" / "auth.ini").read_text().replace("/var/lib/mlflow", str(folder))
        (folder / "auth.ini").write_text(auth)
        self.start()

    def start(self) -> None:
        own = {
            "BACKEND_STORE_URI": f"sqlite:///{self.folder}/server.db", "ARTIFACTS_DESTINATION": str(self.folder / "artifacts"),
            "AUTH_CONFIG_PATH": str(self.folder / "auth.ini"), "AUTH_ADMIN_USERNAME": "admin", "AUTH_ADMIN_PASSWORD": PASSWORD,
            "FLASK_SERVER_SECRET_KEY": "a key of this test",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--app-name", "basic-auth"],
            cwd=self.folder, env=os.environ | {f"MLFLOW_{name}": value for name, value in own.items()}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(f"{self.uri}/health")

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            for each in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patched.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        yield made
    made.kill()


def config(digits: Path, storage: Path, server: Server, wait: int) -> train.Config:
    return train.make_config({
        "method": "dah", "dataset": str(digits), "source": "typeset", "target": "handwritten", "bits": 16, "per_class": 4, "epochs": 3,
        "steps_per_epoch": 10, "workers": 0, "threads": 1, "plots": False, "storage": str(storage), "tracking": server.uri, "tracking_wait": wait,
    })  # fmt: skip


def when(storage: Path, pattern: str, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as a run has such a file."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not list(storage.glob(pattern)) and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def told(server: Server, result: dict[str, Any]) -> tuple[str, list[int], float]:
    """Status of a run on the server, the epochs that it knows the loss of, and the last accuracy."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("hashbridge")
    assert experiment is not None
    (run,) = [each for each in client.search_runs([experiment.experiment_id]) if each.info.run_name == result["run_id"]]
    return run.info.status, [each.step for each in client.get_metric_history(run.info.run_id, "loss/hash")], run.data.metrics.get("accuracy", -1)


def test_a_server_that_is_away_for_a_while_misses_nothing(digits: Path, server: Server, tmp_path: Path) -> None:
    killer = when(tmp_path, "*/progress.jsonl", server.kill)
    starter = when(tmp_path, "*/result.json", server.start)
    result = train.run(config(digits, tmp_path, server, 90))
    killer.join()
    starter.join()
    assert told(server, result) == ("FINISHED", [1, 2, 3], pytest.approx(result["metrics"]["accuracy"]))


def test_a_server_that_stays_away_is_told_later(digits: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killer = when(tmp_path, "*/progress.jsonl", server.kill)
    result = train.run(config(digits, tmp_path, server, 1))
    killer.join()
    assert f"hashbridge sync {result['run_id']}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tracking server http.* does not answer"):
        sync.run(sync.Config(result["run_id"], storage=str(tmp_path)))
    server.start()
    for _ in range(2):  # the second time changes nothing
        sync.run(sync.Config(result["run_id"], storage=str(tmp_path)))
        assert told(server, result) == ("FINISHED", [1, 2, 3], pytest.approx(result["metrics"]["accuracy"]))


def test_a_server_that_knows_us_not_is_one_line(digits: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-word")
    with pytest.raises(ValueError, match="tracking server http.*401") as caught:
        train.run(config(digits, tmp_path, server, 1))
    assert "wrong-word" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_waits_is_sent_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.outbox.FIRST", 0.01)
    came: list[int] = []
    failures = iter([True, True, False, True])

    def send(number: int) -> Callable[[], None]:
        def act() -> None:
            if next(failures, False):
                raise ValueError("away")
            came.append(number)

        return act

    outbox = Outbox()
    for number in range(3):
        outbox(send(number))
    assert outbox.close(10) and came == [0, 1, 2]
    assert not patiently(lambda: (_ for _ in ()).throw(ValueError("away")), 0.05)  # type: ignore[arg-type]
