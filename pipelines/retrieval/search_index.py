"""FAISS binary indexes: build one from packed codes, write it with its rows beside it, read it back with checks."""

import hashlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.filesystem import atomic_write, local_copy, read_table
from pipelines.retrieval.code_files import SCHEMA


def build(codes: np.ndarray, kind: str, neighbours: int = 32, lists: int = 0) -> faiss.IndexBinary:
    """Build an index of packed codes (n, bits / 8) uint8.

    Raises:
        ValueError: there are fewer codes than lists.
    """
    bits = codes.shape[1] * 8
    index: Any
    if kind == "flat":
        index = faiss.IndexBinaryFlat(bits)
    elif kind == "hnsw":
        index = faiss.IndexBinaryHNSW(bits, neighbours)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    else:
        lists = lists or max(1, int(len(codes) ** 0.5))
        if lists > len(codes):
            raise ValueError(f"--lists is {lists}, but there are only {len(codes)} codes")
        coarse: Any = faiss.IndexBinaryFlat(bits)
        index = faiss.IndexBinaryIVF(coarse, bits, lists)
        index.own_fields = True
        coarse.this.disown()
        index.cp.min_points_per_centroid = 1
        index.train(codes)
    index.add(codes)
    return index


def search(index: faiss.IndexBinary, codes: np.ndarray, k: int, probes: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes of an index to each query; all queries get ``min(k, codes in the index)`` answers.

    An IVF index visits some of its lists. Queries that find too few codes there visit more lists, up to all.

    Args:
        codes: (queries, bits / 8) uint8.
        probes: lists that an IVF index visits first; 0 for an eighth of them.

    Returns:
        Hamming distances and positions in the index, (queries, answers) each.

    Raises:
        ValueError: ``probes`` is more than the index has lists, or it has none.
    """
    k = min(k, index.ntotal)
    if isinstance(index, faiss.IndexBinaryHNSW):
        index.hnsw.efSearch = max(index.hnsw.efSearch, k)
    if not isinstance(index, faiss.IndexBinaryIVF):
        if probes:
            raise ValueError("--probes is for an index of kind ivf")
        return index.search(codes, k)
    if probes > index.nlist:
        raise ValueError(f"--probes is {probes}, but the index has {index.nlist} lists")
    index.nprobe = probes or max(1, index.nlist // 8)
    distances, found = index.search(codes, k)
    while (few := (found < 0).any(1)).any() and index.nprobe < index.nlist:
        index.nprobe = min(2 * index.nprobe, index.nlist)
        distances[few], found[few] = index.search(np.ascontiguousarray(codes[few]), k)
    return distances, found


def write(index: faiss.IndexBinary, kind: str, table: pa.Table, meta: dict[str, str], path: Path) -> int:
    """Write an index, and beside it the ids, labels and origins of its codes; returns the index's size in bytes.

    Args:
        table: the rows of the codes, in the index's order.
        meta: ``bits`` and ``model`` of the codes.

    Raises:
        OSError: it could not be written.
    """
    try:
        with atomic_write(path) as file, atomic_write(beside(path)) as side:
            faiss.write_index_binary(index, str(file))
            pq.write_table(table.drop_columns(["code"]).replace_schema_metadata(meta | {"kind": kind, "sha256": _digest(file)}), side)
            return file.stat().st_size
    except RuntimeError as error:
        raise OSError(f"index {path} could not be written: {str(error).splitlines()[0]}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """Path of the Parquet file with an index's rows."""
    return path.with_name(f"{path.name}.parquet")


def read(path: Path) -> tuple[faiss.IndexBinary, pa.Table, dict[str, str]]:
    """Read an index.

    Returns:
        The index, its rows, and ``bits``, ``model`` and ``kind``.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    side = beside(path)
    if not path.is_file() or not side.is_file():
        raise ValueError(f"no index at {path} with {side.name} beside it: make one with `hashbridge index`")
    try:
        rows = read_table(side)
        wanted = [each for each in SCHEMA if each.name != "code"]
        if [(each.name, each.type) for each in rows.schema] != [(each.name, each.type) for each in wanted] or any(c.null_count for c in rows.columns):
            raise ValueError(f"{side.name} has other columns")
        meta = {key.decode(): value.decode() for key, value in (rows.schema.metadata or {}).items()}
        with local_copy(path) as file:
            if not {"bits", "model", "sha256"} <= set(meta) or _digest(file) != meta["sha256"]:  # FAISS does not check what it reads
                raise ValueError("its digest does not match")
            index = faiss.read_index_binary(str(file))
    except (RuntimeError, pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"index {path} cannot be read ({(str(error).splitlines() or [''])[0][:200]}): build it again") from error
    if index.ntotal != len(rows):
        raise ValueError(f"index {path} has {index.ntotal} codes, {side.name} has {len(rows)} rows: build it again")
    return index, rows, meta
