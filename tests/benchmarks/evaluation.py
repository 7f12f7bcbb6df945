"""Evaluation of 10,000 queries against 60,000 codes, beside the usual loop of one sort a query.

Run: python -m tests.benchmarks.evaluation [--queries 10000] [--database 60000] [--bits 64] [--loop-queries 200]
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pipelines.retrieval.metrics import average_precisions, distance_histograms, stable_average_precisions, summarise


def codes(random: np.random.Generator, n: int, bits: int, prototypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes scattered about one prototype a class, as a trained encoder's: packed (n, bits / 8), labels (n,)."""
    labels = random.integers(0, len(prototypes), n)
    return np.packbits(prototypes[labels] ^ (random.random((n, bits)) < 0.2), axis=1, bitorder="little"), labels


def radix_sort_loop(queries: np.ndarray, query_labels: np.ndarray, database: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """A loop made for numpy: distances as uint8 by ``bitwise_count``, which argsort orders by radix."""
    ranks, result = np.arange(1, len(database) + 1), np.empty(len(queries))
    words = database.view(np.uint64)
    for q, query in enumerate(queries.view(np.uint64)):
        distance = np.bitwise_count(words ^ query).sum(1, dtype=np.uint8)
        hits = (database_labels == query_labels[q])[np.argsort(distance, kind="stable")]
        result[q] = (np.cumsum(hits) / ranks)[hits].mean()
    return result


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Print the times, their ratios and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"queries": 10_000, "database": 60_000, "bits": 64, "loop-queries": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    prototypes = random.random((10, given.bits)) < 0.5
    query, database = (codes(random, n, given.bits, prototypes) for n in (given.queries, given.database))
    distance_histograms(query[0][:10], query[1][:10], *database)  # compiled, as in every run after a machine's first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    everything, _ = timed(lambda: summarise(distance_histograms(*query, *database)))
    alone, _ = timed(lambda: average_precisions(distance_histograms(*query, *database)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{given.queries:,} queries, {given.database:,} codes of {given.bits} bits")
    print(f"by counting, all cores: all metrics {everything:.2f} s, mAP alone {alone:.2f} s; peak {peak:.0f} MiB, {before:.0f} MiB of it before")
    some = min(given.loop_queries, given.queries)
    parts = query[0][:some], query[1][:some], *database
    expected = average_precisions(distance_histograms(*parts)).mean()
    for name, loop in {"float argsort": stable_average_precisions, "uint8 radix argsort": radix_sort_loop}.items():
        with threadpool_limits(1):
            seconds, precisions = timed(lambda loop=loop: loop(*parts))
        scaled = seconds / some * given.queries
        print(f"mAP alone, {name} loop, one thread: {scaled:6.1f} s (from {some} queries); ratio {scaled / alone:.0f}; "
              f"mAP of these {precisions.mean():.4f}, by counting {expected:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
