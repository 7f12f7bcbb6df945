"""A run's folder: ``config.json``, ``checkpoints/``, ``progress.jsonl``, ``result.json``, ``plots/``.

``progress.jsonl`` has one line per finished epoch, written by rank 0, with its time in seconds since 1970. The driver follows
this file to show and track the run.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import validation
from data.filesystem import append_text, is_local, to_path, write_text
from data.manifest import Embedding, Manifest

Record = dict[str, Any]


def find_run(name: str, storage: str) -> Path:
    """Find the folder of a run by its id or path.

    Raises:
        ValueError: it does not exist; says where it was searched.
    """
    for folder in (to_path(name),) if "://" in name else (to_path(storage) / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    there = sorted((each.parent for each in to_path(storage).glob("*/config.json")), key=lambda each: each.stat().st_mtime)
    latest = f"; the latest there is {there[-1].name}" if there else ""
    raise ValueError(f"no run {name!r} in {storage}{latest}: give a run's id, or --storage where its folder is")


CONFIG: Record = {"method": str, "dataset": str, "source": str, "target": str, "bits": int, "own": {str: object}, "tracked": str}
RECORDED = ("tracked", "classes", "dataset_digest", "embedding")  # in config.json beside the options
LATEST = 1e11  # seconds since 1970 that a record's time may have
RESULT: Record = {
    "method": str, "source": str, "target": str, "bits": int, "seed": int, "dataset": str, "oracle": bool, "metrics": {str: float}, "notes": [str],
}  # fmt: skip


def read_json(path: Path, form: Any = dict) -> Record:
    """Read a JSON object of a run's folder.

    Args:
        form: its required structure (``data.validation.check``).

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        value = validation.parse_json(path.read_text())
        validation.check(value, form)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return value


def read_config(folder: Path) -> Record:
    """A run's options, and its id in MLflow.

    Raises:
        ValueError: they are missing or damaged.
    """
    saved = read_json(folder / "config.json", CONFIG)
    Embedding.of(saved.get("embedding"))
    return saved


def options(saved: Record) -> Record:
    """The options among what ``config.json`` records."""
    return {name: value for name, value in saved.items() if name not in RECORDED}


def record(folder: Path, chosen: Record, manifest: Manifest, tracked: str) -> None:
    """Write ``config.json``: the run's options, its id in MLflow, and what identifies its dataset and the backbone that embedded it."""
    embedding = {"embedding": asdict(manifest.embedding)} if manifest.embedding else {}
    write_json(folder / "config.json", chosen | {"tracked": tracked, "classes": manifest.classes, "dataset_digest": manifest.digest()} | embedding)


def read_result(folder: Path) -> Record:
    """A run's result.

    Raises:
        ValueError: it is missing or damaged.
    """
    return read_json(folder / "result.json", RESULT)


def read_progress(folder: Path) -> list[Record]:
    """The records of a run's epochs.

    Raises:
        ValueError: they are missing or damaged.
    """
    path = folder / "progress.jsonl"
    try:
        found = [validation.parse_json(line) for line in path.read_text().splitlines()]
        validation.check(found, [{"epoch": int, "epochs": int, "terms": {str: float}, "images_per_second": float, "time": float}])
        if not all(abs(record["time"]) < LATEST for record in found):
            raise ValueError("a time is out of range")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found


def write_json(path: Path, value: Record) -> None:
    """Write a JSON object atomically."""
    write_text(path, json.dumps(value, indent=1, default=float))


class ProgressWriter:
    """Appends records to a run's ``progress.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.jsonl"

    def __call__(self, record: Record) -> None:
        append_text(self.path, json.dumps(record | {"time": time.time()}, default=float) + "\n")


class Follower(threading.Thread):
    """Passes each new record of a run to a listener. Leaving the context passes on the remaining records."""

    def __init__(self, folder: Path, listener: Callable[[Record], None], interval: float = 0) -> None:
        """Args:
            interval: seconds between two reads (default: 0.5, in a bucket 5).
        """
        super().__init__(daemon=True)
        self.path, self.listener, self.interval = folder / "progress.jsonl", listener, interval or (0.5 if is_local(folder) else 5)
        self.offset = self.path.stat().st_size if self.path.exists() else 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(self.interval):
            self.poll()

    def poll(self) -> None:
        """Pass on the records added since the last call; an incomplete line is left for later."""
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self.offset += len(whole.encode())
        for line in whole.splitlines():
            self.listener(json.loads(line))

    def __enter__(self) -> "Follower":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.join()
        with contextlib.suppress(OSError):
            self.poll()


def epoch_line(record: Record, started: float) -> str:
    """One line of a finished epoch."""
    terms = " ".join(f"{name} {value:.4f}" for name, value in record["terms"].items() if not name.endswith(" loss"))
    left = (time.monotonic() - started) / max(record["done_here"], 1) * (record["epochs"] - record["epoch"])
    if not record["terms"]:
        return f"fitted in {record['seconds']:.0f} s"
    speed = record["images_per_second"]
    return f"epoch {record['epoch']:>3}/{record['epochs']}  {speed:,.0f} images/s  {left:4.0f} s left  {terms}"
