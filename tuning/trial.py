"""One trial of a search: a training run that reports its objectives to Ray Tune after each epoch."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.filesystem import append_text, move, to_path, write_text
from pipelines.retrieval.evaluation import evaluate_run
from pipelines.training import runs
from pipelines.training.launch import launch, train
from pipelines.training.options import TrainOptions, make_options
from pipelines.training.plan import Plan, Setup, make_plan, prepare
from pipelines.training.restore import load_method
from tuning.objectives import collect_outputs, objectives

BESIDE = ("number", "continues", "spared")  # what Tune's config of a trial has beside the drawn values
JUDGED, ENDED, FAILED = "judged.jsonl", "trial.json", "failure.txt"  # files of a trial's folder


@dataclass(frozen=True)
class SearchContext:
    """What the trials of a search share.

    Attributes:
        options: of ``hashbridge train``, without the drawn values.
        folder: of the search.
        oracle: when to measure with the target's labels: "" never, "last" or "each" epoch.
    """

    options: dict[str, Any]
    folder: str
    oracle: str


def trial_folder(search: Path, number: int) -> Path:
    """The folder of a trial."""
    return search / f"trial-{number:04d}"


def trial(drawn: dict[str, Any], setting: SearchContext, held: dict[str, dict[str, Any]]) -> None:
    """Train with the drawn values and report each epoch's objectives to Tune; the last epoch's are saved in the trial's folder.

    Args:
        drawn: the values, and what ``tuning.study.Draw`` gives beside them.
        held: arrays of the ``source`` and ``target`` rows in Ray's object store; empty if each trial reads its own.
    """
    values = {name: value for name, value in drawn.items() if name not in BESIDE}
    folder = trial_folder(to_path(setting.folder), drawn["number"])
    if drawn["continues"] and to_path(drawn["continues"]).is_dir():
        move(to_path(drawn["continues"]), folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FAILED).is_file():  # Tune retries failures, but a retry can only help after a node was lost
        raise RuntimeError((folder / FAILED).read_text())
    try:
        _train(make_options(setting.options | values), folder, drawn["number"], setting, held)
    except Exception as error:
        write_text(folder / FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _train(options: TrainOptions, folder: Path, number: int, setting: SearchContext, held: dict[str, dict[str, Any]]) -> None:
    from ray import tune  # noqa: PLC0415

    setup = prepare(options)
    runs.record(folder, asdict(options), setup.manifest, "")
    plan = replace(make_plan(setup, lambda: options.threads), folder=str(folder))
    judge = _Judge(setup, folder, setting.oracle)
    began, started, judged = time.time(), time.monotonic(), 0

    def listen(record: dict[str, Any], method: Any) -> None:
        nonlocal judged
        judged += 1
        told = judge(record, method) | {"number": number, "epoch": record["epoch"], "began": began, "seconds": time.monotonic() - started}
        append_text(folder / JUDGED, json.dumps(told) + "\n")
        if record["epoch"] == options.epochs:
            runs.write_json(folder / ENDED, told)
        tune.report(told)

    if options.workers > 1:
        _train_group(plan, setup, listen)
    else:
        train(plan, setup, listen, {name: _rows(arrays) for name, arrays in held.items()})
    if not judged:  # interrupted after its last epoch and before its evaluation
        listen({"epoch": options.epochs}, load_method(folder, setup.manifest))


def _rows(arrays: dict[str, Any]) -> Any:
    """Wrap arrays of Ray's object store, which training never writes to."""
    import warnings  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from data.rows import Rows  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable" is harmless: indexing copies
        made: dict[str, Any] = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
    return Rows(**made)


def _train_group(plan: Plan, setup: Setup, listen: Any) -> None:
    """Train with Ray Train workers, and evaluate the checkpoint of each finished epoch."""

    folder = to_path(plan.folder)

    def judged(record: dict[str, Any]) -> None:
        listen(record, load_method(folder, setup.manifest))

    follower = runs.Follower(folder, judged)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(launch, plan, setup)
        while not job.done():
            time.sleep(0.5)
            follower.poll()
        job.result()
    follower.poll()


class _Judge:
    """Computes the objectives of a method after an epoch and, if requested, the oracles."""

    def __init__(self, setup: Setup, folder: Path, oracle: str) -> None:
        self.setup, self.folder, self.oracle = setup, folder, oracle

    def __call__(self, record: dict[str, Any], method: Any) -> dict[str, float]:
        options, root, manifest = self.setup.options, self.setup.root, self.setup.manifest
        method.train(False)
        told = objectives(collect_outputs(method, root, manifest, options.source, options.target)) | {"bits": float(options.bits)}
        if self.oracle == "each" or (self.oracle and record["epoch"] == options.epochs):
            found = evaluate_run(self.folder, root, manifest, plots=False)["metrics"]
            told |= {f"oracle/{name}": found[name] for name in ("accuracy", "cross/map", "target/map") if name in found}
        method.train()
        return told
