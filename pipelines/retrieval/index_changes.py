"""Makes and changes a search index: build its shards, add and remove rows, measure its recall.

A change holds the index's lock, writes only the shards that it changes, and then the manifest (``pipelines.retrieval.sharded_index``).
"""

import heapq
import json
import uuid
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.filesystem import atomic_write, bucket, is_local, open_parquet, write_text
from data.locks import file_lock
from pipelines.retrieval import search_index
from pipelines.retrieval.code_files import SCHEMA
from pipelines.retrieval.sharded_index import GROUP, MANIFEST, Record, open_index, read_manifest, read_shard

LOCK = ".lock"


def write_shard(folder: Path, table: pa.Table, index: faiss.IndexBinary) -> Record:
    """Write a shard's files under new names; returns its entry of the manifest.

    Args:
        table: columns of ``code_files.SCHEMA``, in the order of the codes in ``index``.

    Raises:
        OSError: they could not be written.
    """
    name = f"shard-{uuid.uuid4().hex[:12]}"
    try:
        with atomic_write(folder / f"{name}.faiss") as file, atomic_write(folder / f"{name}.parquet") as rows:
            faiss.write_index_binary(index, str(file))
            pq.write_table(table.replace_schema_metadata(None), rows, row_group_size=GROUP)
            digests = {"sha256": search_index.digest_of(file), "sha256_rows": search_index.digest_of(rows)}
    except RuntimeError as error:
        raise OSError(f"index {folder} could not be written: {str(error).splitlines()[0]}") from error
    return {"codes": f"{name}.faiss", "rows": f"{name}.parquet", "count": len(table)} | digests


def build_shard(folder: Path, table: pa.Table, kind: str, neighbours: int, lists: int) -> Record:
    """Sort rows by id, index their codes and write them as a shard."""
    table = table.take(pc.sort_indices(table["id"])).combine_chunks()
    return write_shard(folder, table, search_index.build(codes_of(table), kind, neighbours, lists))


def codes_of(table: pa.Table) -> np.ndarray:
    """The packed codes (n, bits / 8) uint8 of a table."""
    return np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8).reshape(len(table), -1)


def commit(folder: Path, manifest: Record, before: Record | None) -> None:
    """Make a manifest the index's, and remove the files that neither it nor the version before it names."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    kept = {shard[name] for each in (manifest, before) if each for shard in each["shards"] for name in ("codes", "rows")}
    for file in [*folder.glob("shard-*.faiss"), *folder.glob("shard-*.parquet")]:
        if file.name not in kept:
            _delete(file)


def _delete(file: Path) -> None:
    if is_local(file):
        file.unlink(missing_ok=True)
        return
    with bucket(file) as (fs, name):
        fs.rm_file(name)


def create(folder: Path, table: pa.Table, meta: dict[str, str], kind: str, shards: int, neighbours: int = 32, lists: int = 0) -> Record:
    """Build an index of a table of codes, or a new version of the one that is there; several shards by Ray tasks.

    Args:
        table: columns of ``code_files.SCHEMA``.
        meta: ``bits``, ``model`` and, if known, ``classes`` of the codes.

    Raises:
        ValueError: the folder has something else, an id is there twice, or there are fewer codes than shards or lists.
    """
    if len(table) < shards:
        raise ValueError(f"--shards is {shards}, but there are only {len(table)} codes")
    found = table["id"].value_counts()
    twice = found.field("values").filter(pc.greater(found.field("counts"), 1))
    if len(twice):
        raise ValueError(f"{len(twice):,} ids are there more than once, such as {twice[0].as_py()!r}: an id must name one image. Encode again, or one split")
    foreign = folder.is_dir() and not (folder / MANIFEST).is_file() and any(not each.name.startswith((".", "shard-")) for each in folder.iterdir())
    if folder.is_file() or foreign:
        raise ValueError(f"{folder} is there and no index: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    order = pc.sort_indices(table["id"]).to_numpy()
    with file_lock(folder / LOCK):
        before = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        parts = [table.take(order[shard::shards]).combine_chunks() for shard in range(shards)]
        manifest = {
            "format": 1, "version": before["version"] + 1 if before else 1, "kind": kind, "bits": int(meta["bits"]), "model": meta["model"],
            "classes": json.loads(meta.get("classes", "[]")), "parameters": {"neighbours": neighbours, "lists": lists}, "recall": {},
            "shards": _built(folder, parts, kind, neighbours, lists),
        }  # fmt: skip
        commit(folder, manifest, before)
    return manifest


def _built(folder: Path, parts: list[pa.Table], kind: str, neighbours: int, lists: int) -> list[Record]:
    """The shards of tables, each built by a Ray task if there are several."""
    if len(parts) == 1:
        return [build_shard(folder, parts[0], kind, neighbours, lists)]
    from pipelines.console import cluster  # noqa: PLC0415

    ray = cluster.connect()
    task, place = ray.remote(build_shard), folder.resolve()  # workers have another working folder
    try:
        found: list[Record] = ray.get([task.remote(place, part, kind, neighbours, lists) for part in parts])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return found


def add(folder: Path, table: pa.Table, meta: dict[str, str]) -> Record:
    """Add the rows of a table to the smallest shards; only these are written anew.

    Raises:
        ValueError: the codes are of another model or length, or ids are there already.
    """
    read_manifest(folder)  # there is no place for a lock without an index
    with file_lock(folder / LOCK):
        before = read_manifest(folder)
        for name in ("bits", "model"):
            if str(before[name]) != meta[name]:
                raise ValueError(f"the index has {name} {before[name]}, the codes {meta[name]}: an index holds the codes of one model")
        if before["classes"] != json.loads(meta.get("classes", "[]")):
            raise ValueError("the classes of the codes are not those of the index: its labels would mean something else")
        new = set(table["id"].to_pylist())
        twice = sorted(new & {each for shard in before["shards"] for each in _read_rows(folder, shard, ["id"])["id"].to_pylist()})
        if twice or len(new) < len(table):
            count, such = len(twice) or len(table) - len(new), (twice or sorted(new))[0]
            raise ValueError(f"{count} of {len(table)} ids are there already, or twice among the new, such as {such!r}: --remove them first")
        chosen, shards = _levelled([shard["count"] for shard in before["shards"]], len(table)), []
        for number, shard in enumerate(before["shards"]):
            added = table.filter(pa.array(chosen == number)) if (chosen == number).any() else None
            shards.append(shard if added is None else _extended(folder, before, shard, added))
        return _next(folder, before, shards)


def _extended(folder: Path, manifest: Record, shard: Record, added: pa.Table) -> Record:
    """A shard with more rows: a flat one is sorted anew, the others are appended to."""
    table = pa.concat_tables([_read_rows(folder, shard), added.select(SCHEMA.names).cast(SCHEMA)])
    if manifest["kind"] == "flat":
        return build_shard(folder, table, "flat", 0, 0)
    index = read_shard(folder, shard, manifest["bits"])
    index.add(codes_of(added))
    return write_shard(folder, table.combine_chunks(), index)


def _levelled(counts: list[int], rows: int) -> np.ndarray:
    """For each of so many new rows the shard that it goes to: always the smallest."""
    heap = [(count, number) for number, count in enumerate(counts)]
    heapq.heapify(heap)
    chosen = np.empty(rows, np.int64)
    for row in range(rows):
        count, number = heap[0]
        chosen[row] = number
        heapq.heapreplace(heap, (count + 1, number))
    return chosen


def remove(folder: Path, ids: list[str]) -> Record:
    """Remove the rows of these ids; only the shards that have them are written anew.

    Raises:
        ValueError: ids are not in the index, or nothing would be left.
    """
    read_manifest(folder)  # there is no place for a lock without an index
    with file_lock(folder / LOCK):
        before = read_manifest(folder)
        wanted, shards, found = pa.array(sorted(set(ids)), pa.string()), [], set[str]()
        for shard in before["shards"]:
            own = _read_rows(folder, shard, ["id"])["id"]
            gone = pc.is_in(own, value_set=wanted)
            found |= set(own.filter(gone).to_pylist())
            left = pc.invert(gone)
            if pc.all(left).as_py():
                shards.append(shard)
            elif pc.any(left).as_py():
                kept, size = _read_rows(folder, shard).filter(left), before["parameters"]
                lists = min(size["lists"], pc.sum(left).as_py())
                shards.append(build_shard(folder, kept, before["kind"], size["neighbours"], lists))
        missing = sorted(set(ids) - found)
        if missing:
            raise ValueError(f"{len(missing)} of {len(set(ids))} ids are not in the index, such as {missing[0]!r}: nothing was removed")
        if not shards:
            raise ValueError("these are all ids of the index: nothing would be left")
        return _next(folder, before, shards)


def _next(folder: Path, before: Record, shards: list[Record]) -> Record:
    """Commit the next version, with other shards; the recall that was measured does not hold for it."""
    manifest = before | {"version": before["version"] + 1, "shards": shards, "recall": {}}
    commit(folder, manifest, before)
    return manifest


def _read_rows(folder: Path, shard: Record, columns: list[str] | None = None) -> pa.Table:
    """The rows of a shard, or some of their columns."""
    with open_parquet(folder / shard["rows"]) as file:
        return file.read(columns)


def measure(folder: Path, sample: int, k: int, wanted: float = 0.0, seed: int = 0) -> Record:
    """Measure the recall of an index on a sample of its own codes, each left out of its answers; with ``wanted``, first choose the least search for it.

    Recall is the share of the answers that are as near as the k nearest by brute force.

    Returns:
        The manifest with ``recall`` and, if it was chosen, ``probes`` or ``ef``.

    Raises:
        ValueError: the wanted recall cannot be reached, or the index is exact.
    """
    read_manifest(folder)
    with file_lock(folder / LOCK):
        index = open_index(folder)
        manifest = index.manifest
        every = np.concatenate([codes_of(_read_rows(folder, shard, ["code"])) for shard in manifest["shards"]])
        chosen = np.random.default_rng(seed).permutation(len(every))[:sample]
        k = min(k, len(every) - 1)
        if k < 1:
            raise ValueError("the index has one code: there is nothing to measure")
        exact, _ = search_index.search(search_index.build(every, "flat"), every[chosen], k + 1)
        farthest = exact[:, -1].tolist()
        searches = _searches(manifest, index.shards) if wanted else [{}]
        for parameters in searches:
            index.manifest = manifest | {"parameters": manifest["parameters"] | parameters}
            found = index.search(every[chosen], k + 1).distances
            near = [sum(far <= most for far in each) - 1 for each, most in zip(found, farthest, strict=True)]
            recall = float(np.clip(near, 0, k).mean() / k)
            if recall >= wanted:
                break
        else:
            raise ValueError(f"recall {wanted} is not reached: it is {recall:.4f} at most; take --kind flat, or hnsw with more --neighbours")
        final = index.manifest | {"recall": {f"at_{k}": recall}}
        commit(folder, final, manifest)
        return final


def _searches(manifest: Record, shards: list[faiss.IndexBinary]) -> list[dict[str, int]]:
    """The searches that an approximate index can make, the cheapest first.

    Raises:
        ValueError: the index is exact.
    """
    if manifest["kind"] == "flat":
        raise ValueError("--recall is for --kind hnsw or ivf: a flat index finds all")
    if manifest["kind"] == "hnsw":
        return [{"ef": 2**power} for power in range(4, 13)]
    lists = min(shard.nlist for shard in shards)  # type: ignore[attr-defined]
    return [{"probes": min(2**power, lists)} for power in range(lists.bit_length() + 1)]
