"""A tracking server that becomes unreachable during runs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import sync, train
from pipelines.registry.tracking_queue import TrackingQueue, send_with_retries
from tests.servers import Tracking


def config(digits: Path, storage: Path, tracking_server: Tracking, wait: int) -> train.Config:
    return train.make_config({
        "method": "dah", "dataset": str(digits), "source": "typeset", "target": "handwritten", "bits": 16, "per_class": 4, "epochs": 3,
        "steps_per_epoch": 10, "workers": 0, "threads": 1, "plots": False, "storage": str(storage), "tracking": tracking_server.uri, "tracking_wait": wait,
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


def told(tracking_server: Tracking, result: dict[str, Any]) -> tuple[str, list[int], float]:
    """A run's status on the server, the epochs with a loss there, and its accuracy."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_server.uri)
    experiment = client.get_experiment_by_name("hashbridge")
    assert experiment is not None
    (run,) = [each for each in client.search_runs([experiment.experiment_id]) if each.info.run_name == result["run_id"]]
    return run.info.status, [each.step for each in client.get_metric_history(run.info.run_id, "loss/hash")], run.data.metrics.get("accuracy", -1)


def test_a_server_that_is_away_for_a_while_misses_nothing(
    digits: Path, tracking_server: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    tries: list[float] = []
    monkeypatch.setattr("pipelines.registry.tracking_queue.LONGEST", 1.0)
    wait = threading.Event.wait

    def counted(event: threading.Event, timeout: float | None = None) -> bool:
        tries.append(time.monotonic())  # send_with_retries waits here after each failed try
        return wait(event, timeout)

    def away() -> None:
        tracking_server.kill()
        monkeypatch.setattr("pipelines.registry.tracking_queue.threading.Event.wait", counted)
        while len(tries) < 3:
            time.sleep(0.05)
        monkeypatch.setattr("pipelines.registry.tracking_queue.threading.Event.wait", wait)
        tracking_server.start()

    thread = when(tmp_path, "*/progress.jsonl", away)
    result = train.run(config(digits, tmp_path, tracking_server, 90))
    thread.join()
    assert told(tracking_server, result) == ("FINISHED", [1, 2, 3], pytest.approx(result["metrics"]["accuracy"]))


def test_a_server_that_stays_away_is_told_later(digits: Path, tracking_server: Tracking, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killer = when(tmp_path, "*/progress.jsonl", tracking_server.kill)
    result = train.run(config(digits, tmp_path, tracking_server, 1))
    killer.join()
    assert f"hashbridge sync {result['run_id']}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tracking server http.* does not answer"):
        sync.run(sync.Config(result["run_id"], storage=str(tmp_path)))
    tracking_server.start()
    for _ in range(2):  # the second time changes nothing
        sync.run(sync.Config(result["run_id"], storage=str(tmp_path)))
        assert told(tracking_server, result) == ("FINISHED", [1, 2, 3], pytest.approx(result["metrics"]["accuracy"]))


def test_a_server_that_knows_us_not_is_one_line(digits: Path, tracking_server: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-word")
    with pytest.raises(ValueError, match="tracking server http.*401") as caught:
        train.run(config(digits, tmp_path, tracking_server, 1))
    assert "wrong-word" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_waits_is_sent_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.registry.tracking_queue.FIRST", 0.01)
    came: list[int] = []
    failures = iter([True, True, False, True])

    def send(number: int) -> Callable[[], None]:
        def act() -> None:
            if next(failures, False):
                raise ValueError("away")
            came.append(number)

        return act

    outbox = TrackingQueue()
    for number in range(3):
        outbox(send(number))
    assert outbox.close(10) and came == [0, 1, 2]
    assert not send_with_retries(lambda: (_ for _ in ()).throw(ValueError("away")), 0.05)  # type: ignore[arg-type]
