"""Indexes in shards, against brute force: answers, ties by id, changes that readers do not notice, recall."""

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.console.cli import main
from pipelines.retrieval import index_changes, search_index
from pipelines.retrieval.code_files import SCHEMA, read_codes
from pipelines.retrieval.sharded_index import ShardedIndex, open_index, read_manifest
from tests.servers import Head

META = {"bits": "32", "model": "run", "classes": json.dumps(["a", "b"])}


def table(first: int, stop: int, seed: int = 0) -> pa.Table:
    """Rows with few different codes, so that there are many ties, and with ids that are not in their order."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 4, (stop - first, 4), dtype=np.uint8)
    ids = [f"image-{(each * 7919) % 10007}" for each in range(first, stop)]
    return pa.table([ids, [each % 2 for each in range(first, stop)], [code.tobytes() for code in codes], ids], schema=SCHEMA)


def brute(rows: pa.Table, queries: np.ndarray, k: int) -> list[list[tuple[int, str]]]:
    """The nearest rows to each query, ties by id."""
    codes = np.stack([np.frombuffer(code, np.uint8) for code in rows["code"].to_pylist()])
    far = np.bitwise_count(codes[None] ^ queries[:, None]).sum(2)
    return [sorted(zip(each.tolist(), rows["id"].to_pylist(), strict=True))[:k] for each in far]


def answers(index: ShardedIndex, queries: np.ndarray, k: int) -> list[list[tuple[int, str]]]:
    """What an index answers, in the form of ``brute``."""
    found = index.search(queries, k)
    return [[(far, row["id"]) for far, row in zip(*pair, strict=True)] for pair in zip(found.distances, found.rows, strict=True)]


QUERIES = np.random.default_rng(9).integers(0, 4, (20, 4), dtype=np.uint8)


@pytest.mark.parametrize(("shards", "k"), [(1, 10), (3, 10), (3, 400), (7, 1)])
def test_shards_answer_as_brute_force_with_ties_by_id(shards: int, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_changes, "_built", lambda folder, parts, *more: [index_changes.build_shard(folder, part, *more) for part in parts])
    rows = table(0, 300)
    index_changes.create(tmp_path / "i", rows, META, "flat", shards)
    index = open_index(tmp_path / "i")
    assert [len(file.read()) for file in index.files] == [len(rows) // shards + (each < len(rows) % shards) for each in range(shards)]
    assert answers(index, QUERIES, k) == brute(rows, QUERIES, k)
    assert {row["label"] for near in index.search(QUERIES, 20).rows for row in near} == {0, 1}


def test_rows_are_read_from_several_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pipelines.retrieval.sharded_index", "pipelines.retrieval.index_changes"):
        monkeypatch.setattr(f"{place}.GROUP", 64)
    rows = table(0, 300)
    index_changes.create(tmp_path / "i", rows, META, "flat", 1)
    assert open_index(tmp_path / "i").files[0].num_row_groups == 5
    assert answers(open_index(tmp_path / "i"), QUERIES, 100) == brute(rows, QUERIES, 100)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_rows_are_added_and_removed(kind: str, tmp_path: Path) -> None:
    first, more = table(0, 200), table(200, 260, 1)
    index_changes.create(tmp_path / "i", first, META, kind, 1, lists=5)
    index_changes.add(tmp_path / "i", more, META)
    gone = more["id"].to_pylist()[:30] + first["id"].to_pylist()[:50]
    manifest = index_changes.remove(tmp_path / "i", gone)
    left = pa.concat_tables([first.slice(50), more.slice(30)])
    index = open_index(tmp_path / "i")
    assert manifest["version"] == 3 and index.count == len(left) == 180
    found, wanted = answers(index, QUERIES, 180), brute(left, QUERIES, 180)
    assert [sorted(each) for each in found] == [sorted(each) for each in wanted]
    if kind == "flat":
        assert found == wanted


def test_answers_that_a_graph_does_not_find_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_changes.create(tmp_path / "i", table(0, 40), META, "hnsw", 1)
    index = open_index(tmp_path / "i")
    whole = index.search(QUERIES, 5)
    search = search_index.search

    def fewer(*given: object) -> tuple[np.ndarray, np.ndarray]:
        distances, found = search(*given)  # type: ignore[arg-type]
        distances[0, 3:], found[0, 3:] = 2**31 - 1, -1  # as FAISS does
        return distances, found

    monkeypatch.setattr(search_index, "search", fewer)
    less = index.search(QUERIES, 5)
    assert less.rows[0] == whole.rows[0][:3] and less.distances[0] == whole.distances[0][:3] and less.rows[1:] == whole.rows[1:]


def test_only_the_shards_that_change_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_changes, "_built", lambda folder, parts, *more: [index_changes.build_shard(folder, part, *more) for part in parts])
    before = index_changes.create(tmp_path / "i", table(0, 31), META, "flat", 3)
    after = index_changes.add(tmp_path / "i", table(31, 32), META)
    assert [shard["count"] for shard in before["shards"]] == [11, 10, 10] and [shard["count"] for shard in after["shards"]] == [11, 11, 10]
    assert [one == other for one, other in zip(before["shards"], after["shards"], strict=True)] == [True, False, True]
    files = {each.name for each in (tmp_path / "i").glob("shard-*")}
    assert files == {shard[name] for manifest in (before, after) for shard in manifest["shards"] for name in ("codes", "rows")}
    index_changes.remove(tmp_path / "i", table(31, 32)["id"].to_pylist())
    assert len(list((tmp_path / "i").glob("shard-*"))) == 8  # the files of the version before are kept, older ones are gone


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    before = index_changes.create(folder, table(0, 40), META, "flat", 1)
    twice = pa.concat_tables([table(40, 42), table(41, 43)])
    for change, said in (
        (lambda: index_changes.add(folder, table(39, 45), META), "1 of 6 ids are there already"),
        (lambda: index_changes.add(folder, twice, META), "1 of 4 ids are there already, or twice"),
        (lambda: index_changes.add(folder, table(40, 45), META | {"model": "other"}), "has model run, the codes other"),
        (lambda: index_changes.add(folder, table(40, 45), META | {"classes": "[]"}), "classes of the codes"),
        (lambda: index_changes.remove(folder, ["image-0", "nobody"]), "1 of 2 ids are not in the index, such as 'nobody'"),
        (lambda: index_changes.remove(folder, table(0, 40)["id"].to_pylist()), "nothing would be left"),
        (lambda: index_changes.create(folder, table(0, 2), META, "flat", 3), "--shards is 3"),
        (lambda: index_changes.create(tmp_path, table(0, 2), META, "flat", 1), "is there and no index"),
        (lambda: index_changes.create(folder, twice, META, "flat", 1), "1 ids are there more than once, such as 'image-4455'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            change()
    assert read_manifest(folder) == before and answers(open_index(folder), QUERIES, 5) == brute(table(0, 40), QUERIES, 5)


def test_readers_see_one_version_whole_while_it_changes(tmp_path: Path) -> None:
    """Each answer is that of the index before or after a change, also of a reader that has opened an index two versions ago."""
    folder, rows = tmp_path / "i", table(0, 120)
    index_changes.create(folder, rows, META, "flat", 1)
    old, extra, wrong, ended = open_index(folder), table(120, 150, 2), list[str](), threading.Event()
    versions = [brute(each, QUERIES, 9) for each in (rows, pa.concat_tables([rows, extra]))]

    def read() -> None:
        while not ended.is_set():
            if answers(open_index(folder), QUERIES, 9) not in versions:
                wrong.append("mixed")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(6):
        index_changes.add(folder, extra, META)
        index_changes.remove(folder, extra["id"].to_pylist())
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong and answers(old, QUERIES, 9) == versions[0] and read_manifest(folder)["version"] == 13


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_a_recall_that_is_asked_for_is_reached(kind: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    codes = draw.integers(0, 256, (3000, 4), dtype=np.uint8)
    ids = [str(each) for each in range(3000)]
    rows = pa.table([ids, [0] * 3000, [code.tobytes() for code in codes], ids], schema=SCHEMA)
    index_changes.create(tmp_path / "i", rows, META, kind, 1, neighbours=4)
    found = {}
    for wanted in (0.5, 0.98):
        manifest = index_changes.measure(tmp_path / "i", 300, 10, wanted)
        found[wanted] = next(value for name, value in manifest["parameters"].items() if name in ("ef", "probes"))
        assert manifest["recall"]["at_10"] >= wanted
    assert found[0.98] > found[0.5] and read_manifest(tmp_path / "i")["parameters"] == manifest["parameters"]
    near = open_index(tmp_path / "i").search(codes[:200], 11)  # measured with the parameters that were kept
    exact = [each[10][0] for each in brute(rows, codes[:200], 11)]
    assert np.mean([sum(far <= most for far in each) for each, most in zip(near.distances, exact, strict=True)]) / 11 > 0.95


def test_a_shard_that_lost_lists_is_searched_in_all_that_are_left(tmp_path: Path) -> None:
    rows = table(0, 200)
    index_changes.create(tmp_path / "i", rows, META, "ivf", 1)
    manifest = index_changes.measure(tmp_path / "i", 100, 10, 1.0)
    index_changes.remove(tmp_path / "i", rows["id"].to_pylist()[:190])
    index = open_index(tmp_path / "i")
    assert index.shards[0].nlist < manifest["parameters"]["probes"]
    assert [sorted(each) for each in answers(index, QUERIES, 10)] == brute(rows.slice(190), QUERIES, 10)


def test_a_flat_index_finds_all(tmp_path: Path) -> None:
    index_changes.create(tmp_path / "i", table(0, 90), META, "flat", 1)
    assert index_changes.measure(tmp_path / "i", 50, 10)["recall"] == {"at_10": 1.0}
    with pytest.raises(ValueError, match="a flat index finds all"):
        index_changes.measure(tmp_path / "i", 50, 10, 0.9)


def test_the_command_builds_shards_on_ray_and_changes_them(
    tmp_path: Path, ray_cluster: Head, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # which is not the cluster's working folder
    for name, (first, stop) in {"codes": (0, 100), "more": (100, 130)}.items():
        (tmp_path / name).mkdir()
        pq.write_table(table(first, stop).replace_schema_metadata(META), tmp_path / name / "part-0.parquet")
    (tmp_path / "ids.txt").write_text("\n".join(table(0, 100)["id"].to_pylist()[:10]))
    for words, said in {
        "index codes --out i --shards 3": "flat index of 100 codes of 32 bits",
        "index more --out i --add": "flat index of 130 codes",
        "index --out i --remove ids.txt --measure": "recall at 10: 1.0000\nflat index of 120 codes",
    }.items():
        assert main(words.split()) == 0
        assert said in capsys.readouterr().out
    left = pa.concat_tables([read_codes(tmp_path / "codes")[0].slice(10), read_codes(tmp_path / "more")[0]])
    assert answers(open_index(tmp_path / "i"), QUERIES, 12) == brute(left, QUERIES, 12)


@pytest.mark.parametrize(("words", "said"), [
    ("", "CODES is missing"), ("codes --remove ids", "goes without codes"), ("--add", "CODES is missing"), ("codes --recall 0.9", "a flat index finds all"),
    ("codes --recall 2 --kind ivf", "from 0 to 1"), ("codes --shards 0", "must be at least 1"), ("--remove nowhere", "cannot be read"),
    ("--measure", "no index at"),
])  # fmt: skip
def test_wrong_options_get_one_line(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--out", str(tmp_path / "i"), *words.split()]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_new_rows_level_the_shards() -> None:
    assert np.bincount(index_changes._levelled([5, 1, 3], 6), minlength=3).tolist() == [0, 4, 2]


def test_a_wide_search_of_a_graph_leaves_the_next_as_it_is() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (2000, 4), np.uint8)
    fresh, used = search_index.build(codes, "hnsw"), search_index.build(codes, "hnsw")
    search_index.search(used, QUERIES, 1000)
    search_index.search(used, QUERIES, 10, ef=900)
    search_index.search(fresh, QUERIES, 10)
    search_index.search(used, QUERIES, 10)
    assert fresh.hnsw.efSearch == used.hnsw.efSearch == search_index.CANDIDATES  # type: ignore[attr-defined]
