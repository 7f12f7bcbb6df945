"""One trial of a search: a training whose epochs are judged and reported to Ray Tune."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.manifest import Manifest
from data.places import append_text, move, path_of, write_text
from pipelines import evaluate, runs, train
from pipelines.plan import make_plan
from tuning.objectives import look, objectives

CONFIG, JUDGED, ENDED, FAILED = "config.json", "judged.jsonl", "trial.json", "failure.txt"  # files of a trial's folder


@dataclass(frozen=True)
class Setting:
    """What the trials of a search share.

    Attributes:
        options: of ``hashbridge train``, all but the drawn ones.
        folder: the search's.
        oracle: measure with the target's labels too: "" for never, else "last" or "each" epoch.
    """

    options: dict[str, Any]
    folder: str
    oracle: str


def trial_folder(search: Path, number: int) -> Path:
    """Where a trial's files lie."""
    return search / f"trial-{number:04d}"


def trial(drawn: dict[str, Any], setting: Setting, held: dict[str, dict[str, Any]]) -> None:
    """Train with the drawn values; each epoch's objectives go to Tune, the last epoch's into the trial's folder.

    Args:
        drawn: the values, ``number`` of the trial, and ``continues``, the folder of a trial that was cut off, or "".
        held: of ``source`` and ``target``, the rows' arrays in Ray's object store; empty where each trial reads its own.
    """
    values = {name: value for name, value in drawn.items() if name not in ("number", "continues")}
    folder = trial_folder(path_of(setting.folder), drawn["number"])
    if drawn["continues"] and path_of(drawn["continues"]).is_dir():
        move(path_of(drawn["continues"]), folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FAILED).is_file():  # Tune tries again what failed, but only what its node took with it can end better
        raise RuntimeError((folder / FAILED).read_text())
    try:
        _train(train.make_config(setting.options | values), folder, drawn["number"], setting, held)
    except Exception as error:
        write_text(folder / FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _train(config: train.Config, folder: Path, number: int, setting: Setting, held: dict[str, dict[str, Any]]) -> None:
    from ray import tune  # noqa: PLC0415

    runs.write_json(folder / CONFIG, asdict(config) | {"tracked": ""})
    manifest = Manifest.read(path_of(config.dataset))
    plan = make_plan(config, manifest, folder, config.threads)
    plan = replace(plan, config=asdict(config))
    judge = _Judge(config, folder, manifest, setting.oracle)
    began, started, judged = time.time(), time.monotonic(), 0

    def listen(record: dict[str, Any], method: Any) -> None:
        nonlocal judged
        judged += 1
        told = judge(record, method) | {"number": number, "epoch": record["epoch"], "began": began, "seconds": time.monotonic() - started}
        append_text(folder / JUDGED, json.dumps(told) + "\n")
        if record["epoch"] == config.epochs:
            runs.write_json(folder / ENDED, told)
        tune.report(told)

    if config.workers > 1:
        _train_group(plan, config, folder, manifest, listen)
    else:
        train.work(asdict(plan), listen, {name: _rows(arrays) for name, arrays in held.items()})
    if not judged:  # it was cut off between its last epoch and its judgement
        listen({"epoch": config.epochs}, evaluate.load_method(folder, manifest))


def _rows(arrays: dict[str, Any]) -> Any:
    """Rows on the memory of Ray's object store, which no training writes to."""
    import warnings  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from data.batches import Rows  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": indexing copies
        made: dict[str, Any] = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
    return Rows(**made)


def _train_group(plan: Any, config: train.Config, folder: Path, manifest: Manifest, listen: Any) -> None:
    """Train on Ray Train's workers, and judge the checkpoints as their epochs end."""

    def judged(record: dict[str, Any]) -> None:
        listen(record, evaluate.load_method(folder, manifest))

    follower = runs.Follower(folder, judged)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(train.launch, plan, config.workers, config.gpu, config.max_failures)
        while not job.done():
            time.sleep(0.5)
            follower.poll()
        job.result()
    follower.poll()


class _Judge:
    """Objectives of a method after an epoch; with the target's labels, ``oracle/...``, where these are asked for."""

    def __init__(self, config: train.Config, folder: Path, manifest: Manifest, oracle: str) -> None:
        self.config, self.folder, self.manifest, self.oracle = config, folder, manifest, oracle

    def __call__(self, record: dict[str, Any], method: Any) -> dict[str, float]:
        c = self.config
        method.train(False)
        told = objectives(look(method, path_of(c.dataset), self.manifest, c.source, c.target)) | {"bits": float(c.bits)}
        if self.oracle == "each" or (self.oracle and record["epoch"] == c.epochs):
            found = evaluate.evaluate_run(self.folder, path_of(c.dataset), self.manifest, plots=False)["metrics"]
            told |= {f"oracle/{name}": found[name] for name in ("accuracy", "cross/map", "target/map") if name in found}
        method.train()
        return told
