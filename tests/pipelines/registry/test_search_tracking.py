"""What a search tells MLflow of its trials, and in how many messages."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.registry import search_tracking
from pipelines.registry.search_tracking import SearchTracker


class Client:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, float, int]]] = []
        self.ended: list[str] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        if metrics:
            self.batches.append([(each.key, each.value, each.step) for each in metrics])

    def set_terminated(self, run: str, status: str) -> None:
        self.ended.append(f"{run} {status}")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(search_tracking, "connect", lambda uri: client)
    return client


def test_epochs_that_follow_each_other_at_once_are_sent_together(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(search_tracking.time, "monotonic", lambda: now[0])
    tracker = SearchTracker("here", "search", {})
    tracker.begin(0, {"rate": 0.1})
    for epoch, moment in ((1, 0.0), (2, 0.5), (3, 1.0), (4, 3.0), (5, 3.1)):
        now[0] = moment
        tracker.epoch(0, epoch, {"information": epoch / 10, "entropy": float("nan")})
    assert [[step for _, _, step in batch] for batch in client.batches] == [[1], [2, 3, 4]]
    tracker.end(0, "FINISHED")
    assert client.batches[2] == [("information", 0.5, 5)] and client.ended == ["search-0000 FINISHED"]


def test_no_message_has_more_metrics_than_mlflow_takes(client: Client) -> None:
    tracker = SearchTracker("here", "search", {})
    tracker.begin(3, {})
    for epoch in range(1, 1203):
        tracker.epoch(3, epoch, {"information": 1.0})
    tracker.end(3, "KILLED")
    assert [len(batch) for batch in client.batches] == [1, 1000, 201]
    assert [step for batch in client.batches for _, _, step in batch] == list(range(1, 1203))
