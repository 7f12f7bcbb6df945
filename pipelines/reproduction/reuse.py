"""Runs by their options: the result of one that is there already, the rest of one that was cut off, or a new one."""

from pathlib import Path
from typing import Any

from data.filesystem import to_path
from data.manifest import Manifest
from pipelines import train
from pipelines.training import runs
from pipelines.training.options import TrainOptions, make_options

SAME = ("method", "source", "target", "bits", "epochs", "steps_per_epoch", "least_steps", "seed", "own")  # options by which a finished run is reused


def finished_and_cut_off(wanted: TrainOptions) -> tuple[dict[str, Any] | None, Path | None]:
    """Look for a run with the same options: its result if it has ended, and its folder if it was cut off."""
    root, digest = to_path(wanted.dataset), ""
    cut_off = None
    for folder in sorted(each.parent for each in to_path(wanted.storage).glob("*/config.json")):
        saved = runs.read_config(folder)
        if to_path(saved["dataset"]).resolve() != root.resolve() or any(saved.get(name) != getattr(wanted, name) for name in SAME):
            continue
        if not (folder / "result.json").is_file():
            cut_off = folder
            continue
        result, digest = runs.read_result(folder), digest or Manifest.read(root).digest()
        if result["dataset"] == digest:  # not of a dataset that was ingested again since
            return result, cut_off
    return None, cut_off


def result_of(wanted: TrainOptions) -> dict[str, Any]:
    """The result of a run: from an earlier run with the same options if there is one, otherwise after training."""
    result, cut_off = finished_and_cut_off(wanted)
    if result is not None:
        print(f"run {result['run_id']} has this result already")
        return result
    if cut_off is None:
        return train.run(wanted)
    return train.run(make_options({"resume": cut_off.name, "storage": wanted.storage, "tracking": wanted.tracking}))
