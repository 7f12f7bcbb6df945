"""Sends a hyper-parameter search's record to MLflow: a run for the search, and a child run for each trial."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.filesystem import local_copy
from pipelines.registry.connection import EXPERIMENT, connect, one_line_errors

PAUSE = 2.0  # seconds between a trial's messages
MOST = 1000  # metrics that MLflow takes at once


class SearchTracker:
    """Sends a search's record to MLflow: a run for the search, and a child run for each trial.

    Epochs that follow each other within ``PAUSE`` seconds are sent together. If the server does not accept something, this is reported once
    and the search continues; its folder keeps the full record.
    """

    def __init__(self, uri: str, name: str, parameters: dict[str, Any], tracked: str = "") -> None:
        """Args:
            uri: tracking URI; "" for none.
            name: of the search.
            tracked: MLflow's id of a search to continue; "" for a new one.
        """
        self.uri, self.name, self.tracked, self.warned = uri, name, tracked, False
        self.trials: dict[int, str] = {}
        self.unsent: dict[int, list[Any]] = {}
        self.sent: dict[int, float] = {}
        self.client = connect(uri) if uri else None
        if self.client and not tracked:
            with one_line_errors(uri):
                self.tracked = self._new(name, {}, parameters)

    def _new(self, name: str, tags: dict[str, str], parameters: dict[str, Any]) -> str:
        from mlflow.entities import Param  # noqa: PLC0415

        assert self.client is not None
        run = self.client.create_run(self.client.get_experiment_by_name(EXPERIMENT).experiment_id, run_name=name, tags=tags)
        self.client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
        return run.info.run_id

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            with one_line_errors(self.uri):
                yield
        except ValueError as error:
            if not self.warned:
                print(f"note: {error}", file=sys.stderr)
            self.warned = True

    def begin(self, number: int, values: dict[str, Any], continues: int = -1) -> None:
        """Start a trial's run, with its drawn values; or go on with the run of the trial that had paused, if this tracker began it."""
        if not self.client or number in self.trials:  # a retried trial has a run already
            return
        name = f"{self.name}-{number:04d}"
        with self._lenient():
            if continues in self.trials:
                self.trials[number] = self.trials.pop(continues)
                self.client.update_run(self.trials[number], status="RUNNING", name=name)
            else:
                self.trials[number] = self._new(name, {"mlflow.parentRunId": self.tracked}, values)

    def epoch(self, number: int, epoch: int, result: dict[str, float]) -> None:
        """Log a trial's metrics after an epoch."""
        if self.client and number in self.trials:
            from mlflow.entities import Metric  # noqa: PLC0415

            now = int(time.time() * 1000)
            self.unsent.setdefault(number, []).extend(Metric(name, value, now, epoch) for name, value in result.items() if math.isfinite(value))
            if time.monotonic() - self.sent.get(number, -math.inf) >= PAUSE:
                self._send(number)

    def _send(self, number: int) -> None:
        """Send what a trial's epochs have left."""
        assert self.client is not None
        metrics, self.sent[number] = self.unsent.pop(number, []), time.monotonic()
        for first in range(0, len(metrics), MOST):
            with self._lenient():
                self.client.log_batch(self.trials[number], metrics[first : first + MOST])

    def end(self, number: int, status: str) -> None:
        """End a trial's run."""
        if self.client and number in self.trials:
            self._send(number)
            self.sent.pop(number)
            with self._lenient():
                self.client.set_terminated(self.trials[number], status)

    def finish(self, folder: Path, values: dict[str, float], status: str) -> None:
        """Log the search's files and best values, and end its run."""
        if self.client:
            with self._lenient(), local_copy(folder) as results:
                self.client.log_artifacts(self.tracked, str(results))
                for name, value in values.items():
                    self.client.log_metric(self.tracked, f"best/{name}", value)
                self.client.set_terminated(self.tracked, status)


def best_of_searches(uri: str, method: str, objective: str, maximise: bool, count: int) -> dict[str, dict[str, str]]:
    """Values of the best finished trial of each of the last searches that a server has of a method by an objective, by the name of its run.

    Raises:
        ValueError: the server cannot be reached.
    """
    client = connect(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    found: dict[str, dict[str, str]] = {}
    with one_line_errors(uri):
        searches = f"params.method = '{method}' and params.objective = '{objective}'"  # other runs have no objective
        for parent in client.search_runs([experiment], searches, order_by=["attributes.start_time DESC"]):
            mine = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
            best = client.search_runs([experiment], mine, order_by=[f"metrics.`{objective}` {'DESC' if maximise else 'ASC'}"], max_results=1)
            found |= {each.info.run_name: dict(each.data.params) for each in best if objective in each.data.metrics}
            if len(found) == count:
                break
    return found
