"""Indexes against brute force: every query gets as many answers as it asks for, and numbers that FAISS would crash on are refused."""

import faiss
import numpy as np
import pytest

from pipelines.console.cli import main
from pipelines.retrieval import search_index


def codes(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_every_query_gets_k_answers(kind: str) -> None:
    database, queries = codes(400, 0), codes(34, 1)
    index = search_index.build(database, kind, lists=40 if kind == "ivf" else 0)
    distances, found = search_index.search(index, queries, 150)
    assert found.shape == (34, 150) and (found >= 0).all()
    assert all(len(set(row)) == 150 for row in found.tolist())
    np.testing.assert_array_equal(distances, np.bitwise_count(database[found] ^ queries[:, None]).sum(2))
    if kind == "flat":
        np.testing.assert_array_equal(distances, np.sort(np.bitwise_count(database[None] ^ queries[:, None]).sum(2), 1)[:, :150])


def test_more_probes_find_nearer_codes_and_all_of_them_the_nearest() -> None:
    database, queries = codes(2000, 2), codes(50, 3)
    index, exact = search_index.build(database, "ivf", lists=50), search_index.build(database, "flat")
    best = search_index.search(exact, queries, 5)[0].sum()
    sums = [int(search_index.search(index, queries, 5, probes)[0].sum()) for probes in (1, 8, 50)]
    assert sums[0] > sums[1] >= sums[2] == best


def test_probes_that_an_index_does_not_have_are_refused() -> None:
    index = search_index.build(codes(100, 4), "ivf", lists=10)
    with pytest.raises(ValueError, match="--probes is 11, but the index has 10 lists"):
        search_index.search(index, codes(1, 5), 3, 11)
    with pytest.raises(ValueError, match="for an index of kind ivf"):
        search_index.search(search_index.build(codes(100, 4), "flat"), codes(1, 5), 3, 1)


def test_a_read_ivf_index_is_still_one(tmp_path: object) -> None:
    index = search_index.build(codes(100, 6), "ivf", lists=10)
    faiss.write_index_binary(index, f"{tmp_path}/i")
    again = faiss.read_index_binary(f"{tmp_path}/i")
    assert (search_index.search(again, codes(9, 7), 100)[1] >= 0).all()


@pytest.mark.parametrize(("options", "said"), [("--neighbours 1", "from 2 to 512"), ("--neighbours 0", "from 2 to 512"), ("--lists -3", "not be negative")])
def test_numbers_that_faiss_does_not_check_are_refused(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "codes", "--out", "i", "--kind", "hnsw", *options.split()]) == 2
    assert said in capsys.readouterr().err
