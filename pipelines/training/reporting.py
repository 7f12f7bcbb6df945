"""Reports a run while it trains: a line per epoch on the terminal, and its record to MLflow."""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data.filesystem import remove, to_path
from data.manifest import Manifest
from pipelines.registry.connection import default_uri
from pipelines.registry.tracking import RunTracker
from pipelines.registry.tracking_queue import TrackingQueue, send_with_retries
from pipelines.training import runs
from pipelines.training.options import TrainOptions


class Reporter:
    """Shows and tracks the epochs of one run. Neither a slow nor an unreachable tracking server delays training."""

    def __init__(self, options: TrainOptions, folder: Path, tracker: RunTracker | None) -> None:
        self.options, self.folder, self.tracker = options, folder, tracker
        self.started, self.epochs, self.queue = time.monotonic(), 0, TrackingQueue()

    @property
    def seconds(self) -> float:
        """Seconds since the run began, or went on."""
        return time.monotonic() - self.started

    def epoch(self, record: dict[str, Any]) -> None:
        """Show and track one finished epoch."""
        self.epochs += 1
        print(runs.epoch_line(record | {"done_here": self.epochs}, self.started), file=sys.stderr, flush=True)
        if "profile" in record:
            print(record["profile"], file=sys.stderr, flush=True)
        if self.tracker:
            self.queue(partial(self.tracker.epoch, record))

    def fail(self) -> None:
        """Track that the run failed."""
        self.queue.close(0 if self.tracker is None else 5)
        if self.tracker:
            self.tracker.fail()

    def finish(self, metrics: dict[str, float]) -> None:
        """Send what is left; says so if the server does not take it in ``tracking_wait`` seconds."""
        wait = self.options.tracking_wait
        sent = self.queue.close(wait)
        if self.tracker and not (sent and send_with_retries(partial(self.tracker.finish, metrics, self.folder), wait)):
            self.tracker.fail()
            command = f"hashbridge sync {self.folder.name} --storage {self.options.storage}"
            print(f"note: run {self.folder.name} is not fully tracked: `{command}` sends the rest", file=sys.stderr)


def tracking_uri(options: TrainOptions) -> str:
    """The tracking URI of a run; "" with ``--tracking none``.

    Raises:
        ValueError: the storage folder needs one, or cannot have the default one.
    """
    return "" if options.tracking == "none" else options.tracking or default_uri(options.storage)


def open_tracker(options: TrainOptions, folder: Path, manifest: Manifest, tracked: str) -> RunTracker | None:
    """The tracker of a run; None with ``--tracking none``. Sends a new run's parameters.

    Args:
        tracked: MLflow's id of a run to continue; "" for a new one.

    Raises:
        ValueError: the server does not answer. The folder of a run that has not begun is removed.
    """
    uri, tracker = tracking_uri(options), None
    if not uri:
        return None
    try:
        tracker = RunTracker(uri, folder.name, tracked)
        if not tracked:
            parameters = {k: v for k, v in asdict(options).items() if k not in ("own", "resume", "tracking")} | options.own
            rows = sum(manifest.split(domain, "train").rows for domain in {options.source, options.target} - {""})
            tracker.start(parameters, {"name": manifest.dataset, "digest": manifest.digest(), "path": str(to_path(options.dataset).resolve())}, rows)
    except ValueError:
        if tracker:
            tracker.fail()
        if not (folder / "config.json").exists():
            remove(folder)
        raise
    return tracker
