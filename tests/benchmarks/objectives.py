"""How well each label-free objective orders the trials of finished searches, and what its choice loses against the oracle's.

Objectives that a search's method does not have, and oracles, are left out; the means are over the searches that have them.

Run: python -m tests.benchmarks.objectives SEARCH ...   each a folder of `hashbridge tune ... --oracle`
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from tuning.objectives import OBJECTIVES
from tuning.report import RESULTS

ORACLES = ("oracle/accuracy", "oracle/cross/map", "oracle/target/map")
WIDTH = 24  # of an oracle's two columns


def ended(search: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The trials of a search that came to their end, and the oracles that they have."""
    rows = [row for row in pq.read_table(search / RESULTS / "trials.parquet").to_pylist() if row["status"] == "complete"]
    return rows, [name for name in ORACLES if rows and all(row.get(name) is not None for row in rows)]


def judged(rows: list[dict[str, Any]], name: str, oracles: list[str]) -> dict[str, tuple[float, float]]:
    """By oracle: rank correlation with it, and how much less of it the objective's choice has than the oracle's, in points."""
    values = np.array([np.nan if row.get(name) is None else row[name] for row in rows]) * (1 if OBJECTIVES[name].maximise else -1)
    if not np.isfinite(values).all():
        return {}
    truths = {oracle: np.array([row[oracle] for row in rows]) for oracle in oracles}
    return {oracle: (float(spearmanr(values, truth).statistic), 100 * float(truth.max() - truth[values.argmax()])) for oracle, truth in truths.items()}


def table(figures: dict[str, dict[str, tuple[float, float]]], oracles: list[str]) -> None:
    """Print a row for each objective; a dash where it has no figure."""
    print(f"{'':<14}" + "".join(f"{oracle:>{WIDTH}}" for oracle in oracles))
    print(f"{'':<14}" + f"{'rank corr.':>{WIDTH // 2}}{'points lost':>{WIDTH // 2}}" * len(oracles))
    for name, found in figures.items():
        pairs = [found.get(oracle) for oracle in oracles]
        print(f"{name:<14}" + "".join(f"{pair[0]:>{WIDTH // 2}.2f}{pair[1]:>{WIDTH // 2}.2f}" if pair else f"{'-':>{WIDTH}}" for pair in pairs))


def main() -> None:
    """Print a table for each search, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", type=Path)
    given = parser.parse_args()
    every: dict[str, dict[str, list[tuple[float, float]]]] = {name: {oracle: [] for oracle in ORACLES} for name in OBJECTIVES}
    for search in given.searches:
        rows, oracles = ended(search)
        best = ", ".join(f"{oracle} {max(row[oracle] for row in rows):.4f}" for oracle in oracles)
        print(f"\n{search.name}: {len(rows)} trials; best {best}")
        figures = {name: judged(rows, name, oracles) for name in OBJECTIVES}
        table({name: found for name, found in figures.items() if found}, oracles)
        for name, found in figures.items():
            for oracle, pair in found.items():
                every[name][oracle].append(pair)
    print(f"\nmean of {len(given.searches)} searches")
    means = {name: {oracle: tuple(np.mean(pairs, 0)) for oracle, pairs in found.items() if pairs} for name, found in every.items()}
    table({name: found for name, found in means.items() if found}, list(ORACLES))


if __name__ == "__main__":
    main()
