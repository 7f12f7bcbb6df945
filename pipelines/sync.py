"""Command: send the record of a run to its tracking server, if the server was unreachable during the run."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from data.filesystem import to_path
from data.manifest import Manifest
from pipelines.console.config import build, option, positional
from pipelines.training import runs
from pipelines.training.options import TrainOptions
from pipelines.training.reporting import open_tracker


@dataclass
class Config:
    """Options of ``hashbridge sync``."""

    run: str = positional("a run's id")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI (default: the run's own, else MLFLOW_TRACKING_URI, else SQLite in the storage)")


def run(config: Config) -> dict[str, Any]:
    """Send every epoch, the result and the plots. Sending twice changes nothing.

    Raises:
        ValueError: the run has not ended, or the server does not answer.
    """
    folder = runs.find_run(config.run, config.storage)
    if not (folder / "result.json").exists():
        raise ValueError(f"run {folder.name} has not ended: `hashbridge train --resume {folder.name}` continues and tracks it")
    saved, result = runs.read_config(folder), runs.read_result(folder)
    own: TrainOptions = build(TrainOptions, runs.options(saved))
    records = runs.read_progress(folder)
    kept = "" if own.tracking == "none" else own.tracking
    same = not config.tracking or config.tracking == kept  # run ids are only valid on their own server
    trained = dataclasses.replace(own, tracking=config.tracking or kept, storage=str(folder.parent))
    tracker = open_tracker(trained, folder, Manifest.read(to_path(own.dataset)), saved["tracked"] if same else "")
    if tracker is None:
        raise ValueError("--tracking is none, but sync needs a server: give its URI")
    try:
        for record in records:
            tracker.epoch(record)
        tracker.finish(result["metrics"], folder)
    except BaseException:
        tracker.fail()
        raise
    runs.write_json(folder / "config.json", saved | {"tracked": tracker.tracked, "tracking": trained.tracking})
    print(f"run {folder.name}: {len(records)} epochs and the result are tracked")
    return {"run_id": folder.name, "tracked": tracker.tracked, "epochs": len(records)}
