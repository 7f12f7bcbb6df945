"""Ways to search against random search, all of the same number of epochs, space and seeds: the best of a search over the epochs that it spent.

Run: python -m tests.benchmarks.samplers METHOD --dataset FOLDER --source usps --target mnist [--arms "random;TPE + ASHA"] [--seeds 0,1,2]
     [--epochs 4] [--spent 120] [--steps-per-epoch 60] [--per-class 10] [--storage runs/samplers] [--picture samplers.png]
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.console.cli import set_default_environment
from tuning import search
from tuning import study as studies
from tuning.objectives import OBJECTIVES
from tuning.trial import JUDGED


class Arm(NamedTuple):
    """A way to search: its sampler, how many trials it draws at random, what stops trials early, first trials, how many trials it has for one of random's."""

    sampler: str
    start_up: int = 10
    stop: str = "asha"
    start: str = "default,paper"
    share: float = 2.0


RANDOM = "random"
ARMS = {
    RANDOM: Arm("random", stop="none", start="none", share=1.0), "TPE + ASHA": Arm("tpe", start="none"), "TPE + ASHA from defaults": Arm("tpe"),
    "TPE 4 + ASHA": Arm("tpe", 4, start="none"),
    "TPE 4 + ASHA from defaults": Arm("tpe", 4), "TPE 4 + pause from defaults": Arm("tpe", 4, "pause", share=2.8),
    "GP 4 + ASHA from defaults": Arm("gp", 4, share=2.4), "GP 4 + pause from defaults": Arm("gp", 4, "pause", share=2.8),
    "CMA-ES 4 + ASHA from defaults": Arm("cmaes", 4),
    "random from defaults": Arm("random", stop="none", share=1.0),
    "TPE 4 + median from defaults": Arm("tpe", 4, "median"), "TPE 4 + hyperband from defaults": Arm("tpe", 4, "hyperband"),
    "TPE 4 from defaults": Arm("tpe", 4, "none", share=1.0),
}  # fmt: skip
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
    way = ARMS[arm]
    study, trials = f"{given.method}-{arm.replace(' ', '').replace('+', '-')}-{seed}", int(given.spent / given.epochs * way.share)
    folder = Path(given.storage) / study
    shared = ("method", "dataset", "source", "target", "epochs", "steps_per_epoch", "per_class", "objective", "storage")
    values = {name: getattr(given, name) for name in shared} | {"study": study, "trials": trials, "seed": seed}
    values |= {"sampler": way.sampler, "stop": way.stop, "start": way.start, "concurrency": 2, "threads": 1, "oracle": True, "tracking": "none"}
    if (folder / search.SAVED).exists():
        values = {"method": given.method, "study": study, "storage": given.storage, "trials": trials, "resume": True}
    studies.START_UP = way.start_up
    with contextlib.redirect_stdout(sys.stderr):
        search.run(search.make_config(values))
    return folder


def of_defaults(folder: Path, epochs: int) -> dict[str, Any] | None:
    """What a search found of its first trial, the defaults; None if that was not trained to its end."""
    place = folder / "trial-0000" / JUDGED
    records = [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []
    return next((record for record in records if record["epoch"] == epochs), None)


def mean(curves: list[list[Point]], epochs: int, pick: str) -> float:
    """The mean of the searches' best after so many epochs; of those in which a trial had ended."""
    there = [getattr(point, pick) for points in curves if (point := at(points, epochs))]
    return statistics.mean(there) if there else math.nan


def draw(curves: dict[str, list[list[Point]]], spent: int, name: str, out: Path) -> None:
    """Two charts, of the objective and of the oracle: a line for the mean of each way to search, and a faint one for each search."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for number, (arm, each) in enumerate(curves.items()):
        colour = "tab:grey" if arm == RANDOM else f"C{number}"
        for axis, pick, label in zip(axes, ("value", "oracle"), (name, "mAP of the target (oracle)"), strict=True):
            x = list(range(1, spent + 1))
            axis.plot(x, [mean(each, count, pick) if all(at(points, count) for points in each) else math.nan for count in x], color=colour, label=arm)
            for points in each:
                axis.step([point.epochs for point in points], [getattr(point, pick) for point in points], where="post", color=colour, alpha=0.2)
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
        "arms": ";".join(ARMS),
    }.items():  # fmt: skip
        parser.add_argument(f"--{option}", default=default)
    for option, count in {"epochs": 4, "spent": 120, "steps-per-epoch": 60, "per-class": 10}.items():
        parser.add_argument(f"--{option}", type=int, default=count)
    given = parser.parse_args()
    set_default_environment()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    try:
        arms = list(dict.fromkeys([RANDOM, *(arm.strip() for arm in given.arms.split(";"))]))
        if unknown := set(arms) - set(ARMS):
            raise ValueError(f"there is no way to search {unknown.pop()!r}: there are {'; '.join(ARMS)}")
        folders = {arm: [searched(given, arm, seed) for seed in seeds] for arm in arms}
        curves = {arm: [curve(folder, given.objective, given.epochs, given.spent) for folder in each] for arm, each in folders.items()}
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{given.method}, {given.source} -> {given.target}, seeds {given.seeds}: mean of the best so far, by {given.objective}")
    thirds = (given.spent // 3, 2 * given.spent // 3, given.spent)
    print(f"{'':<32}" + "".join(f"{f'{given.objective} at {spent}':>20}{'oracle mAP':>12}" for spent in thirds) + f"{'random reached at':>20}")
    sign = 1 if OBJECTIVES[given.objective].maximise else -1
    last = statistics.mean(points[-1].value for points in curves[RANDOM])
    for arm, each in curves.items():
        line, reached = f"{arm:<32}", "not"
        for spent in range(1, given.spent + 1):
            value = mean(each, spent, "value")
            line += f"{value:>20.4f}{mean(each, spent, 'oracle'):>12.4f}" if spent in thirds else ""
            if reached == "not" and all(at(points, spent) for points in each) and sign * value >= sign * last:
                reached = str(spent)
        print(line + f"{reached:>20}")
    for arm in arms:
        found = [each for folder in folders[arm] if ARMS[arm].start != "none" and (each := of_defaults(folder, given.epochs))]
        if len(found) == len(seeds):
            value, oracle = (statistics.mean(each[name] for each in found) for name in (given.objective, ORACLE))
            print(f"the defaults, in {arm}: {given.objective} {value:.4f}, oracle mAP {oracle:.4f}")
    if given.picture:
        draw(curves, given.spent, given.objective, Path(given.picture))


if __name__ == "__main__":
    main()
