"""Metrics against brute force over every order of ties, and against plain rankings."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from pipelines.retrieval import metrics


def case(seed: int, queries: int = 6, database: int = 6, classes: int = 2) -> tuple[np.ndarray, ...]:
    """Random codes of 8 bits at few distances, so that ties abound."""
    random = np.random.default_rng(seed)
    palette = np.array([0, 1, 3], np.uint8)
    return (
        palette[random.integers(0, 3, (queries, 1))], random.integers(0, classes, queries),
        palette[random.integers(0, 3, (database, 1))], random.integers(0, classes, database),
    )  # fmt: skip


def orders(query: np.ndarray, database: np.ndarray) -> list[list[int]]:
    """Every ranking that sorts by Hamming distance."""
    distance = np.bitwise_count(query ^ database).sum(1)
    groups = [list(permutations(np.flatnonzero(distance == d))) for d in np.unique(distance)]
    return [[i for group in chosen for i in group] for chosen in product(*groups)]


def average_precision(hits: np.ndarray, k: int, best: int) -> float:
    ranks = np.arange(1, len(hits) + 1)
    return float((np.cumsum(hits) / ranks * hits)[:k].sum() / best)


def test_counting_leaves_the_number_of_threads_as_it_is() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2, 64):
        torch.set_num_threads(threads)
        metrics.distance_histograms(*case(0))
        found = torch.get_num_threads()
        torch.set_num_threads(before)
        assert found == threads


@pytest.mark.parametrize("seed", range(12))
def test_map_is_the_mean_over_all_orders_of_ties(seed: int) -> None:
    q, ql, d, dl = case(seed)
    histogram = metrics.distance_histograms(q, ql, d, dl)
    for k in (None, 1, 3, 6):
        found = metrics.average_precisions(histogram, k)
        for i in range(len(q)):
            relevant = int((dl == ql[i]).sum())
            if not relevant:
                assert np.isnan(found[i])
                continue
            best = min(relevant, k or len(d))
            expected = np.mean([average_precision(dl[o] == ql[i], k or len(d), best) for o in orders(q[i], d)])
            assert found[i] == pytest.approx(expected, abs=1e-12)
            if k:
                mean = np.mean([(dl[o] == ql[i])[:k].mean() for o in orders(q[i], d)])
                assert metrics.precision_at(histogram, k)[i] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("bits", [8, 24, 64, 128])
def test_histograms_count_what_numpy_counts(bits: int) -> None:
    random = np.random.default_rng(bits)
    q, d = random.integers(0, 256, (30, bits // 8), dtype=np.uint8), random.integers(0, 256, (200, bits // 8), dtype=np.uint8)
    ql, dl = random.integers(-1, 6, 30), random.integers(-1, 5, 200)
    found = metrics.distance_histograms(q, ql, d, dl)
    for i in range(30):
        distance = np.bitwise_count(q[i] ^ d).sum(1)
        assert found.counts[i].tolist() == np.bincount(distance[dl >= 0], minlength=bits + 1).tolist()
        hits = distance[(dl == ql[i]) & (dl >= 0)]
        assert found.relevant[i].tolist() == np.bincount(hits, minlength=bits + 1).tolist()


def test_without_ties_the_figures_are_the_usual_ones() -> None:
    database = np.array([[0], [1], [3], [7], [15]], np.uint8)
    histogram = metrics.distance_histograms(np.array([[0]], np.uint8), np.array([1]), database, np.array([1, 0, 1, 0, 1]))
    assert metrics.average_precisions(histogram)[0] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert metrics.precision_at(histogram, 2)[0] == pytest.approx(0.5)
    summary = metrics.summarise(histogram)
    assert (summary["precision_radius_2"], summary["recall_radius_2"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    stable = metrics.stable_average_precisions(np.array([[0]], np.uint8), np.array([1]), database, np.array([1, 0, 1, 0, 1]))
    assert stable[0] == pytest.approx(metrics.average_precisions(histogram)[0])


@pytest.mark.parametrize("unlabelled", [[], [0], [3, 7]])
def test_leaving_each_query_out_equals_removing_it(unlabelled: list[int]) -> None:
    q, ql, _, _ = case(3, queries=8)
    ql[unlabelled] = -1
    histogram = metrics.distance_histograms(q, ql, q, ql, own=True)
    whole, first = metrics.average_precisions(histogram), metrics.precision_at(histogram, 7)
    for i in range(len(q)):
        rest = np.arange(len(q)) != i
        without = metrics.distance_histograms(q[i : i + 1], ql[i : i + 1], q[rest], ql[rest])
        np.testing.assert_allclose(whole[i], metrics.average_precisions(without)[0])
        np.testing.assert_allclose(first[i], metrics.precision_at(without, 7)[0])


def test_an_unlabelled_database_row_is_not_a_wrong_answer() -> None:
    q, ql, d, dl = case(5, queries=9, database=9)
    half = np.where(np.arange(9) % 2, dl, -1)
    labelled = metrics.distance_histograms(q, ql, d[half >= 0], half[half >= 0])
    found = metrics.distance_histograms(q, ql, d, half)
    np.testing.assert_array_equal(found.counts, labelled.counts)
    np.testing.assert_allclose(metrics.average_precisions(found), metrics.average_precisions(labelled))
    np.testing.assert_allclose(
        metrics.stable_average_precisions(q, ql, d, half), metrics.stable_average_precisions(q, ql, d[half >= 0], half[half >= 0])
    )


def test_stable_ranks_leave_out_the_query_itself_and_know_no_class_of_unlabelled_rows() -> None:
    random = np.random.default_rng(0)
    q, ql = random.integers(0, 256, (40, 2), dtype=np.uint8), random.integers(-1, 4, 40)
    whole = metrics.stable_average_precisions(q, ql, q, ql, own=True)
    for i in range(40):
        rest = np.arange(40) != i
        alone = metrics.stable_average_precisions(q[i : i + 1], ql[i : i + 1], q[rest], ql[rest])
        np.testing.assert_allclose(whole[i], alone[0] if ql[i] >= 0 else np.nan)


@pytest.mark.parametrize("own", [False, True])
def test_cosine_precisions_leave_out_unlabelled_rows(own: bool) -> None:
    random = np.random.default_rng(1)
    features, labels = random.normal(size=(60, 8)).astype(np.float32), random.integers(-1, 3, 60)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    known = labels >= 0
    queries, wanted = (features, labels) if own else (features[:20], labels[:20])
    found = metrics.cosine_precisions(queries, wanted, features, labels, own)
    assert found == pytest.approx(metrics.cosine_precisions(queries[wanted >= 0], wanted[wanted >= 0], features[known], labels[known], own))
    assert set(found) == {"precision_at_1", "precision_at_5", "precision_at_15"}


def test_no_relevant_code_and_unequal_bits_are_said() -> None:
    q, d = np.zeros((1, 1), np.uint8), np.zeros((2, 1), np.uint8)
    with pytest.raises(ValueError, match="no query has a relevant code"):
        metrics.summarise(metrics.distance_histograms(q, np.array([5]), d, np.array([0, 1])))
    with pytest.raises(ValueError, match="8 bits, the database has 16"):
        metrics.distance_histograms(q, np.array([0]), np.zeros((2, 2), np.uint8), np.array([0, 1]))
