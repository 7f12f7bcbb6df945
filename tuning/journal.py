"""Optuna storage in a bucket, which cannot hold a database: each batch of log entries is one object."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from data.filesystem import to_path, write_text


class Journal(BaseJournalBackend):
    """Optuna's log in a folder that one process writes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.parts = 0
        self.logs: list[dict[str, Any]] = []
        for part in sorted(self._path().glob("*.json"), key=lambda each: each.name):
            self.logs += json.loads(part.read_text())
            self.parts += 1

    def _path(self) -> Path:
        return to_path(self.folder)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The log entries from a number on."""
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append log entries, first in the bucket."""
        write_text(self._path() / f"{self.parts:08d}.json", json.dumps(logs))
        self.parts += 1
        self.logs += json.loads(json.dumps(logs))
