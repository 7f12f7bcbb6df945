"""A thousand trials of a toy objective through the whole machinery of a search: study, MLflow, Ray Tune, table and pictures.

A toy trial draws the method's values, and sleeps and reports after each of its four epochs. With 16 at once one would begin every 0.125 s if
none ended early (--stop none) and there were no overhead; trials that pause begin faster. The pace is printed for each hundred trials, so that what
grows with their number is seen; then the time of the results, the driver's memory, and the databases' sizes.

Run: python -m tests.benchmarks.trials [--trials 1000] [--at-once 16] [--sampler tpe] [--method dah] [--database sqlite|postgresql] [--stop pause]
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data.filesystem import append_text, move, to_path
from pipelines import ingest
from pipelines.console.cli import set_default_environment
from pipelines.training import runs
from tests.servers import Database
from tuning import report, search
from tuning.trial import ENDED, JUDGED, SearchContext, trial_folder

BEGUN, TOGETHER = "begun", "together"  # files: of a trial that has begun; of the number of trials at once
EPOCHS, EPOCH = 4, 0.5  # epochs of a trial, and the seconds that each sleeps


def toy(drawn: dict[str, Any], setting: SearchContext, held: dict[str, Any]) -> None:
    """Stands for ``tuning.trial.trial``: a bowl over the logarithms of the numbers drawn, with noise, better with each epoch."""
    from ray import tune  # noqa: PLC0415

    folder = trial_folder(to_path(setting.folder), drawn["number"])
    if drawn["continues"]:
        move(to_path(drawn["continues"]), folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [value for name, value in drawn.items() if isinstance(value, float)]
    height = sum(math.log10(abs(value) + 1e-6) ** 2 for value in numbers) / max(1, len(numbers))
    noise = random.Random(drawn["number"])
    (folder / BEGUN).touch()
    together = int((folder.parents[1] / TOGETHER).read_text())
    while drawn["number"] < together and sum(1 for _ in folder.parent.glob(f"trial-*/{BEGUN}")) < together:
        time.sleep(0.5)  # until all processes are there, so that Ray's start is not measured
    done = len((folder / JUDGED).read_text().splitlines()) if drawn["continues"] else 0
    began, started = time.time(), time.monotonic()
    for epoch in range(done + 1, EPOCHS + 1):
        time.sleep(EPOCH)
        told = {"information": 2.0 - height / 4 - 0.3 / epoch + noise.gauss(0, 0.02), "bits": 64.0, "number": drawn["number"], "epoch": epoch}
        told |= {"process": os.getpid(), "began": began, "seconds": time.monotonic() - started}
        append_text(folder / JUDGED, json.dumps(told) + "\n")
        if epoch == EPOCHS:
            runs.write_json(folder / ENDED, told)
        tune.report(told)


def main() -> None:
    """Print the overhead of a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--sampler", default="tpe", choices=search.SAMPLERS)
    parser.add_argument("--method", default="dah")
    parser.add_argument("--database", default="sqlite", choices=("sqlite", "postgresql"))
    parser.add_argument("--stop", default="pause", choices=search.STOPPING)
    given = parser.parse_args()
    set_default_environment()
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ingest.run(ingest.Config("digits", dataset=str(folder / "set"), size=20))
        values = {
            "method": given.method, "dataset": str(folder / "set"), "source": "typeset", "target": "handwritten", "epochs": EPOCHS,
            "storage": str(folder / "runs"), "study": "toy", "trials": given.trials, "sampler": given.sampler,
            "stop": given.stop, "concurrency": given.at_once, "threads": 1,
        }  # fmt: skip
        if given.database == "postgresql":
            for purpose in ("study_storage", "tracking"):  # Optuna's and MLflow's tables cannot share a database
                database = Database(folder)
                stack.callback(database.stop)
                if not database.process:
                    parser.error("there is no PostgreSQL here")
                stack.callback(database.process.send_signal, signal.SIGINT)  # does not wait for its clients
                values[purpose] = database.uri
        (folder / "runs").mkdir()
        (folder / "runs" / TOGETHER).write_text(str(given.at_once))
        import ray  # noqa: PLC0415

        ray.init("local", num_cpus=given.at_once, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        search.trial, marks = toy, list[float]()  # type: ignore[assignment]
        began, conclude = time.perf_counter(), report.conclude

        def concluding(*arguments: Any) -> dict[str, Any]:
            marks.append(time.perf_counter())
            return conclude(*arguments)

        report.conclude = concluding
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: SIM115  a line for each event
            told = search.run(search.make_config(values))
        ended, first_lines = time.perf_counter(), [json.loads(file.read_text().partition("\n")[0]) for file in folder.glob(f"runs/toy/trial-*/{JUDGED}")]
        starts, processes = sorted(each["began"] for each in first_lines), {each["process"] for each in first_lines}
        print(f"\n{given.trials} trials of {given.method}, {given.sampler}, {given.at_once} at once, {given.database}: {told['trials']}")
        for first in range(0, given.trials - 99, 100):
            part = starts[first : first + 100]
            print(f"trials {first:>4} to {first + 99:>4}: {(part[-1] - part[0]) / 99:.3f} s a trial, longest pause {max(_steps(part)):.2f} s")
        print(f"all: {marks[0] - began:.1f} s, of which the first reports came after {starts[0] - _epoch(began):.1f} s; results {ended - marks[0]:.1f} s")
        print(f"{len(processes)} processes")
        print(f"median pause between trials {statistics.median(_steps(starts)):.3f} s")
        print(f"driver's largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
        for file in sorted((folder / "runs").rglob("*.db")):
            print(f"{file.relative_to(folder)}: {file.stat().st_size / 2**20:.1f} MiB")
        ray.shutdown()


def _epoch(counter: float) -> float:
    """The time of day of a value of ``perf_counter``."""
    return time.time() - (time.perf_counter() - counter)


def _steps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


if __name__ == "__main__":
    sys.exit(main())
