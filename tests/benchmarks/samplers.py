"""TPE with ASHA against random search, both of the same number of epochs, space and seeds: the best of a search over the epochs that it spent.

Run: python -m tests.benchmarks.samplers METHOD --dataset FOLDER --source usps --target mnist [--seeds 0,1,2] [--epochs 4] [--spent 120]
     [--steps-per-epoch 60] [--per-class 10] [--storage runs/samplers] [--picture samplers.png]
"""

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.console.cli import set_default_environment
from tuning import search
from tuning.objectives import OBJECTIVES
from tuning.trial import JUDGED

ARMS = {"random": ("random", False, 1.0), "TPE + ASHA": ("tpe", True, 1.9)}  # sampler, ASHA, how many trials for one of random's
ORACLE = "oracle/target/map"


class Point(NamedTuple):
    """The best finished trial after some epochs: its objective, and what the target's labels say of it."""

    epochs: int
    value: float
    oracle: float


def curve(folder: Path, name: str, epochs: int, spent: int) -> list[Point]:
    """The best so far of a search, by the epochs that all its trials had spent."""
    records: list[dict[str, Any]] = [json.loads(line) for file in folder.glob(f"trial-*/{JUDGED}") for line in file.read_text().splitlines()]
    records.sort(key=lambda record: record["began"] + record["seconds"])
    sign, points = 1 if OBJECTIVES[name].maximise else -1, list[Point]()
    for count, record in enumerate(records[:spent], 1):
        if record["epoch"] == epochs and (not points or sign * record[name] > sign * points[-1].value):
            points.append(Point(count, record[name], record[ORACLE]))
    if len(records) < spent:
        raise ValueError(f"{folder.name} spent {len(records)} epochs, not {spent}: give it more trials")
    return points


def at(points: list[Point], epochs: int) -> Point | None:
    """The best after so many epochs; None where no trial had ended."""
    return next((point for point in reversed(points) if point.epochs <= epochs), None)


def searched(given: argparse.Namespace, arm: str, seed: int) -> Path:
    """The folder of an arm's search for a seed; the search is run, or gone on with, where it has not ended."""
    sampler, asha, share = ARMS[arm]
    study, trials = f"{given.method}-{sampler}-{seed}", int(given.spent / given.epochs * share)
    folder = Path(given.storage) / study
    shared = ("method", "dataset", "source", "target", "epochs", "steps_per_epoch", "per_class", "objective", "storage")
    values = {name: getattr(given, name) for name in shared} | {"study": study, "sampler": sampler, "asha": asha, "trials": trials, "seed": seed}
    values |= {"concurrency": 2, "threads": 1, "oracle": True, "tracking": "none"}
    if (folder / search.SAVED).exists():
        values = {"method": given.method, "study": study, "storage": given.storage, "trials": trials, "resume": True}
    with contextlib.redirect_stdout(sys.stderr):
        search.run(search.make_config(values))
    return folder


def draw(curves: dict[str, list[list[Point]]], spent: int, name: str, out: Path) -> None:
    """Two charts, of the objective and of the oracle: a line for each search."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for colour, (arm, each) in zip(("tab:grey", "tab:blue"), curves.items(), strict=True):
        for axis, pick, label in zip(axes, ("value", "oracle"), (name, "mAP of the target (oracle)"), strict=True):
            for index, points in enumerate(each):
                x = [point.epochs for point in points] + [spent]
                y = [getattr(point, pick) for point in points]
                axis.step(x, [*y, y[-1]], where="post", color=colour, label=arm if not index else None, alpha=0.8)
            axis.set(xlabel="epochs spent by all trials", ylabel=label)
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the searches, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    for option, default in {
        "dataset": "", "source": "", "target": "", "seeds": "0,1,2", "objective": "information", "storage": "runs/samplers", "picture": "",
    }.items():  # fmt: skip
        parser.add_argument(f"--{option}", default=default)
    for option, count in {"epochs": 4, "spent": 120, "steps-per-epoch": 60, "per-class": 10}.items():
        parser.add_argument(f"--{option}", type=int, default=count)
    given = parser.parse_args()
    set_default_environment()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    try:
        curves = {arm: [curve(searched(given, arm, seed), given.objective, given.epochs, given.spent) for seed in seeds] for arm in ARMS}
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{given.method}, {given.source} -> {given.target}, seeds {given.seeds}: mean of the best so far, by {given.objective}")
    print(f"{'epochs spent':<14}" + "".join(f"{arm:>26}" for arm in curves) + f"\n{'':<14}" + f"{given.objective:>14}{'oracle mAP':>12}" * len(curves))
    for spent in (given.spent // 3, 2 * given.spent // 3, given.spent):
        line = f"{spent:<14}"
        for each in curves.values():
            there = [point for points in each if (point := at(points, spent))]
            value, oracle = (statistics.mean(getattr(point, pick) for point in there) if there else float("nan") for pick in ("value", "oracle"))
            line += f"{value:>14.4f}{oracle:>12.4f}"
        print(line)
    sign = 1 if OBJECTIVES[given.objective].maximise else -1
    for seed, random, other in zip(seeds, *curves.values(), strict=True):
        reached = next((point.epochs for point in other if sign * point.value >= sign * random[-1].value), None)
        said = f"after {reached} epochs" if reached else f"not in {given.spent} epochs"
        print(f"seed {seed}: random ends with {random[-1].value:.4f}, found after {random[-1].epochs}; TPE + ASHA has as much {said}")
    if given.picture:
        draw(curves, given.spent, given.objective, Path(given.picture))


if __name__ == "__main__":
    main()
