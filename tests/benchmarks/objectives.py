"""How well each label-free objective orders the trials of finished searches, and what its choice loses against the oracle's.

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

ORACLES = ("oracle/accuracy", "oracle/target/map")


def ended(search: Path) -> list[dict[str, Any]]:
    """The trials of a search that came to their end."""
    rows = pq.read_table(search / RESULTS / "trials.parquet").to_pylist()
    return [row for row in rows if row["status"] == "complete" and all(row.get(name) is not None for name in ORACLES)]


def judged(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Rank correlation with each oracle, and how much less of it the objective's choice has than the oracle's; in points."""
    sign = 1 if OBJECTIVES[name].maximise else -1
    values = sign * np.array([row[name] for row in rows])
    found = []
    for oracle in ORACLES:
        truth = np.array([row[oracle] for row in rows])
        found += [float(spearmanr(values, truth).statistic), 100 * float(truth.max() - truth[values.argmax()])]
    return found


def main() -> None:
    """Print a table for each search, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", type=Path)
    given = parser.parse_args()
    means: dict[str, list[list[float]]] = {name: [] for name in OBJECTIVES}
    head = f"{'':<14}" + "".join(f"{'rank corr.':>12}{'loss, points':>14}" for _ in ORACLES)
    for search in given.searches:
        rows = ended(search)
        best = ", ".join(f"{name} {max(row[name] for row in rows):.4f}" for name in ORACLES)
        print(f"\n{search.name}: {len(rows)} trials; best {best}; columns for {' and '.join(ORACLES)}\n{head}")
        for name in OBJECTIVES:
            figures = judged(rows, name)
            means[name].append(figures)
            print(f"{name:<14}" + "".join(f"{value:>{width}.2f}" for value, width in zip(figures, (12, 14, 12, 14), strict=True)))
    print(f"\nmean of {len(given.searches)} searches\n{head}")
    for name, figures in means.items():
        print(f"{name:<14}" + "".join(f"{value:>{width}.2f}" for value, width in zip(np.mean(figures, 0), (12, 14, 12, 14), strict=True)))


if __name__ == "__main__":
    main()
