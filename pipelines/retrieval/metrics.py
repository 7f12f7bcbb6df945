"""Retrieval metrics from counts per Hamming distance: tie-aware and without sorting.

All metrics follow from two histograms per query: the numbers of all and of relevant database codes at each distance 0..bits.
Codes at equal distance are ties; their order is taken as random, and the metrics are expectations over it (McSherry and
Najork, ECIR 2008).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

Array = np.ndarray
MAP_KS = (50, 100, 200, 1000)  # of mAP@k
KS = (1, 5, 15, *MAP_KS)  # of P@k


@numba.njit(inline="always")
def _popcount(x: Any) -> Any:  # pragma: no cover  compiled; LLVM reduces it to one instruction
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@numba.njit(parallel=True, cache=True)
def _count(queries: Array, database: Array, starts: Array, classes: Array, counts: Array, relevant: Array) -> None:  # pragma: no cover
    """Fill the histograms. The database is grouped by class: class c has rows starts[c]..starts[c+1]."""
    words = queries.shape[1]
    for q in numba.prange(queries.shape[0]):
        lanes = np.zeros((4, counts.shape[1]), np.int32)  # four histograms, so that increments do not wait for each other
        for own in range(2):
            low = starts[classes[q]] if own else 0
            high = starts[classes[q] + 1] if own else database.shape[0]
            if own:
                for d in range(counts.shape[1]):
                    counts[q, d] = lanes[0, d] + lanes[1, d] + lanes[2, d] + lanes[3, d]
                lanes[:] = 0
            for row in range(low, high):
                distance = np.uint64(0)
                for word in range(words):
                    distance += _popcount(queries[q, word] ^ database[row, word])
                lanes[row & 3, distance] += 1
            if own:
                for d in range(counts.shape[1]):
                    relevant[q, d] = lanes[0, d] + lanes[1, d] + lanes[2, d] + lanes[3, d]


def _words(packed: Array) -> Array:
    """Packed codes (n, bytes) as (n, words) uint64, the last word padded with zeros."""
    width = -(-packed.shape[1] // 8) * 8
    padded = np.zeros((len(packed), width), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


class Encoded(NamedTuple):
    """An encoded split: packed codes (n, bits / 8) uint8, labels (n,), its name, and what else was computed of its rows, each (n, ...)."""

    codes: Array
    labels: Array
    name: str
    more: Mapping[str, Array] = MappingProxyType({})


@dataclass
class Histograms:
    """Counts per query and Hamming distance: (queries, bits + 1) int32 each."""

    counts: Array
    relevant: Array


def labelled(rows: Array, labels: Array) -> tuple[Array, Array]:
    """The rows with a label: without one a row is neither relevant nor wrong."""
    return (rows, labels) if (labels >= 0).all() else (rows[labels >= 0], labels[labels >= 0])


def distance_histograms(queries: Array, query_labels: Array, database: Array, database_labels: Array, own: bool = False) -> Histograms:
    """Count the labelled database codes at each distance from each query.

    Args:
        queries, database: (n, bits / 8) and (m, bits / 8) uint8 packed codes.
        query_labels, database_labels: (n,) and (m,) integers; relevant rows have the same label. Database rows with a negative
            label are ignored.
        own: queries and database are the same rows in the same order; exclude each query from its own ranking.
    """
    bits = queries.shape[1] * 8
    if database.shape[1] != queries.shape[1]:
        raise ValueError(f"queries have {bits} bits, the database has {database.shape[1] * 8}: encode both with one model")
    database, database_labels = labelled(database, database_labels)
    order = np.argsort(database_labels, kind="stable")
    names = np.unique(database_labels)
    starts = np.searchsorted(database_labels[order], np.append(names, np.inf))
    starts = np.append(starts, starts[-1]).astype(np.int64)  # one extra, empty class for labels that the database does not have
    place = np.minimum(np.searchsorted(names, query_labels), len(names))
    known = np.append(names, -1)[place] == query_labels
    classes = np.where(known & (query_labels >= 0), place, len(names)).astype(np.int64)
    result = Histograms(*(np.zeros((len(queries), bits + 1), np.int32) for _ in range(2)))
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    _count(_words(queries), _words(database[order]), starts, classes, result.counts, result.relevant)
    torch.set_num_threads(threads)  # which numba's kernel sets too where both use OpenMP, and on which rounding depends
    if own:
        result.counts[:, 0] -= query_labels >= 0
        result.relevant[:, 0] -= known & (query_labels >= 0)
    return result


def _before(values: Array) -> Array:
    """Sums over all smaller distances."""
    return np.cumsum(values, 1, dtype=np.int64) - values


def average_precisions(histogram: Histograms, k: int | None = None) -> Array:
    """Expected average precision of each query over all orders of ties; nan if nothing is relevant.

    In a group of n ties with r relevant codes, after N codes of which R are relevant, the code at position i of the group is
    relevant with probability r / n, and then has R + 1 + (i - 1)(r - 1) / (n - 1) relevant codes up to itself, in expectation.

    Args:
        k: cut the ranking after k codes and normalise by min(relevant, k); None for the full ranking.

    Returns:
        (queries,) float64.
    """
    n, r = histogram.counts.astype(np.int64), histogram.relevant.astype(np.int64)
    before, relevant_before = _before(n), _before(r)
    size = int(n.sum(1).max(initial=0))  # where queries leave themselves out, one without label ranks one code more
    taken = n if k is None else np.clip(k - before, 0, n)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, size + 1))])
    reciprocal = harmonic[before + taken] - harmonic[before]  # sum over i = 1..taken of 1 / (N + i)
    positions = taken - (before + 1) * reciprocal  # sum over i of (i - 1) / (N + i)
    slope = (r - 1) / np.maximum(n - 1, 1)
    gain = r / np.maximum(n, 1) * ((relevant_before + 1) * reciprocal + slope * positions)
    total = r.sum(1)
    best = total if k is None else np.minimum(total, k)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, gain.sum(1) / best, np.nan)


def precision_at(histogram: Histograms, k: int) -> Array:
    """(queries,) expected precision among the first k, over all orders of ties; k at most the size of the database."""
    n, r = histogram.counts.astype(np.int64), histogram.relevant.astype(np.int64)
    taken = np.clip(k - _before(n), 0, n)
    return (taken * r / np.maximum(n, 1)).sum(1) / n.sum(1).clip(1, k)


def precision_recall(histogram: Histograms) -> tuple[Array, Array]:
    """Precision and recall within each Hamming radius 0..bits, (bits + 1,) each, mean over the queries with relevant codes.

    A query without codes within a radius has precision 0 there.
    """
    counts, relevant = np.cumsum(histogram.counts, 1), np.cumsum(histogram.relevant, 1)
    some = relevant[:, -1] > 0
    counts, relevant = counts[some], relevant[some]
    if not some.any():
        return np.full(histogram.counts.shape[1], np.nan), np.full(histogram.counts.shape[1], np.nan)
    return (relevant / np.maximum(counts, 1)).mean(0), (relevant / relevant[:, -1:]).mean(0)


def summarise(histogram: Histograms, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """mAP, mAP@k, P@k, precision and recall within radius 2, over the queries with relevant codes.

    Raises:
        ValueError: no query has a relevant code.
    """
    some = histogram.relevant.sum(1) > 0
    if not some.any():
        raise ValueError("no query has a relevant code in the database: check that both use the same class labels")
    kept = Histograms(histogram.counts[some], histogram.relevant[some])
    precision, recall = precision_recall(kept)
    figures = {"map": float(average_precisions(kept).mean()), "precision_radius_2": float(precision[2]), "recall_radius_2": float(recall[2])}
    for k in ks:
        if k <= kept.counts[0].sum():
            figures |= {f"map_at_{k}": float(average_precisions(kept, k).mean())} if k in MAP_KS else {}
            figures |= {f"precision_at_{k}": float(precision_at(kept, k).mean())}
    return figures


def cosine_precisions(queries: Array, query_labels: Array, database: Array, database_labels: Array, own: bool = False) -> dict[str, float]:
    """P@k with ranking by cosine similarity of real features, over the same queries as in ``summarise``.

    Args:
        queries, database: (n, width) and (m, width) float32, L2-normalised.
        own: queries and database are the same rows in the same order; exclude each query from its own ranking.
    """
    place = np.cumsum(database_labels >= 0) - 1  # of each row among the labelled ones
    database, database_labels = labelled(database, database_labels)
    names, counts = np.unique(database_labels, return_counts=True)
    some = np.flatnonzero(np.isin(query_labels, names[counts > own]))
    ks = [k for k in KS if k <= len(database) - own]
    sums = np.zeros(len(ks))
    for chosen in np.array_split(some, -(-len(some) // 256)) if ks else ():
        nearness = queries[chosen] @ database.T
        if own:
            nearness[np.arange(len(chosen)), place[chosen]] = -np.inf
        near = np.argpartition(-nearness, ks[-1] - 1, axis=1)[:, : ks[-1]]
        order = np.argsort(-np.take_along_axis(nearness, near, 1), axis=1, kind="stable")
        hits = database_labels[np.take_along_axis(near, order, 1)] == query_labels[chosen, None]
        sums += [hits[:, :k].mean(1).sum() for k in ks]
    return {f"precision_at_{k}": float(total / len(some)) for k, total in zip(ks, sums, strict=True)}


def stable_average_precisions(queries: Array, query_labels: Array, database: Array, database_labels: Array, own: bool = False) -> Array:
    """Average precision with ties in database order, as older programs compute it; only for comparison.

    Args: as of ``distance_histograms``.

    Returns:
        (queries,) float64, nan if nothing is relevant.
    """
    place = np.cumsum(database_labels >= 0) - 1
    database, database_labels = labelled(database, database_labels)
    bits = np.unpackbits(database, axis=1, bitorder="little").astype(np.float32) * 2 - 1
    result = np.full(len(queries), np.nan)
    for q, query in enumerate(np.unpackbits(queries, axis=1, bitorder="little").astype(np.float32) * 2 - 1):
        order = np.argsort(-(bits @ query), kind="stable")
        if own and query_labels[q] >= 0:
            order = order[order != place[q]]
        hits = (database_labels == query_labels[q])[order]
        if hits.any():
            result[q] = (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean()
    return result
