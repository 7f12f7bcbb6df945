"""A search index on disk: a manifest, and for each shard a FAISS binary file of codes and a Parquet file of their rows.

A change writes new files and then the manifest, which names the files that are the index: a reader sees the index of before or of after. The files of the
version before stay until the next change, for readers that have begun with it. Rows lie on disk and are read for answers alone.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import validation
from data.filesystem import local_copy, open_parquet
from pipelines.retrieval import search_index
from pipelines.retrieval.code_files import SCHEMA

MANIFEST = "manifest.json"
GROUP = 1024  # rows that are read at once for an answer
Record = dict[str, Any]
FORM: Record = {
    "format": int, "version": int, "kind": str, "bits": int, "model": str, "classes": [str], "parameters": {str: int}, "recall": {str: float},
    "shards": [{"codes": str, "rows": str, "count": int, "sha256": str, "sha256_rows": str}],
}  # fmt: skip


@dataclass
class Answers:
    """The answers to each query: Hamming distances, and the rows of ``id``, ``label`` and ``origin``, nearest first; ties are in the order of their ids."""

    distances: list[list[int]]
    rows: list[list[Record]]


@dataclass
class ShardedIndex:
    """An index that is open for searches.

    Attributes:
        folder: where it lies.
        manifest: as read.
        shards: FAISS indexes, in the manifest's order.
        files: their rows, open, so that they can be read after a later version has removed them.
    """

    folder: Path
    manifest: Record
    shards: list[faiss.IndexBinary]
    files: list[pq.ParquetFile]

    @property
    def count(self) -> int:
        """Codes of all shards."""
        return sum(shard["count"] for shard in self.manifest["shards"])

    def search(self, codes: np.ndarray, k: int, probes: int = 0) -> Answers:
        """The nearest codes of all shards to each query; ``min(k, codes)`` of them, of kind hnsw sometimes fewer.

        Args:
            codes: (queries, bits / 8) uint8.
            probes: lists of each shard that an index of kind ivf visits first; 0 for the manifest's.

        Raises:
            ValueError: ``probes`` is more than a shard has lists, or it has none.
        """
        parts = [self.search_shard(number, codes, k, probes) for number in range(len(self.shards))]
        return merged(parts, k)

    def search_shard(self, number: int, codes: np.ndarray, k: int, probes: int = 0) -> Answers:
        """The nearest codes of one shard; an HNSW graph may find fewer than k."""
        distances, found = nearest_places(self.shards[number], codes, k, self.manifest["parameters"], probes)
        rows = self.rows(number, found[found >= 0])
        nearest = [[rows[place] for place in near if place >= 0] for near in found.tolist()]
        return Answers([far[near >= 0].tolist() for far, near in zip(distances, found, strict=True)], nearest)

    def rows(self, number: int, places: np.ndarray) -> dict[int, Record]:
        """A shard's rows at these places, read from disk."""
        file, found = self.files[number], dict[int, Record]()
        wanted = np.unique(places)
        for group in np.unique(wanted // GROUP).tolist():
            own = wanted[wanted // GROUP == group]
            table = file.read_row_group(group, ["id", "label", "origin"]).take(own - group * GROUP)
            found |= dict(zip(own.tolist(), table.to_pylist(), strict=True))
        return found


def nearest_places(
    shard: faiss.IndexBinary, codes: np.ndarray, k: int, parameters: dict[str, int], probes: int = 0
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Distances and places in a shard, (queries, answers) each, searched as widely as the manifest's ``parameters`` say, or with so many ``probes``."""
    own = min(parameters.get("probes", 0), getattr(shard, "nlist", 0))  # a shard that lost rows has fewer lists
    return search_index.search(shard, codes, k, probes or own, parameters.get("ef", 0))


def merged(parts: list[Answers], k: int) -> Answers:
    """The k nearest of several shards' answers, ties by id."""
    queries = zip(*(zip(part.distances, part.rows, strict=True) for part in parts), strict=True)
    found = [nearest(query, k) for query in queries]
    return Answers([distances for distances, _ in found], [rows for _, rows in found])


def nearest(found: Iterable[tuple[list[int], list[Record]]], k: int) -> tuple[list[int], list[Record]]:
    """The distances and rows of the k nearest answers to one query in several shards, ties by id."""
    pairs = heapq.nsmallest(k, (pair for far, near in found for pair in zip(far, near, strict=True)), key=lambda pair: (pair[0], pair[1]["id"]))
    return [distance for distance, _ in pairs], [row for _, row in pairs]


def read_manifest(folder: Path) -> Record:
    """Read and check an index's manifest.

    Raises:
        ValueError: there is no index, or it cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"no index at {folder}: make one with `hashbridge index`")
    try:
        manifest: Record = validation.parse_json((folder / MANIFEST).read_text())
        validation.check(manifest, FORM)
        names = [shard[name] for shard in manifest["shards"] for name in ("codes", "rows")]
        if not names or any(Path(name).name != name for name in names) or any(shard["count"] < 1 for shard in manifest["shards"]):
            raise ValueError("it has no shards, or names or counts that no index has")
    except (OSError, ValueError) as error:
        raise ValueError(f"index {folder} cannot be read ({(str(error).splitlines() or [''])[0][:200]}): build it again") from error
    return manifest


def open_index(folder: Path) -> ShardedIndex:
    """Open an index for searches.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    manifest = read_manifest(folder)
    try:
        shards = [read_shard(folder, shard, manifest["bits"]) for shard in manifest["shards"]]
        files = [_open_rows(folder, shard) for shard in manifest["shards"]]
    except (RuntimeError, pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if read_manifest(folder)["version"] != manifest["version"]:  # it was changed twice since
            return open_index(folder)
        raise ValueError(f"index {folder} cannot be read ({(str(error).splitlines() or [''])[0][:200]}): build it again") from error
    return ShardedIndex(folder, manifest, shards, files)


def _open_rows(folder: Path, shard: Record) -> pq.ParquetFile:
    """The rows of a shard, which are of the expected columns and number."""
    file = open_parquet(folder / shard["rows"])
    if [(each.name, each.type) for each in file.schema_arrow] != [(each.name, each.type) for each in SCHEMA] or file.metadata.num_rows != shard["count"]:
        raise ValueError(f"{shard['rows']} has other columns or rows")
    return file


def read_shard(folder: Path, shard: Record, bits: int) -> faiss.IndexBinary:
    """The FAISS index of a shard, whose files are as they were written."""
    for name, digest in (("codes", "sha256"), ("rows", "sha256_rows")):  # FAISS does not check what it reads
        with local_copy(folder / shard[name]) as file:
            if search_index.digest_of(file) != shard[digest]:
                raise ValueError(f"the digest of {shard[name]} does not match")
            if name == "codes":
                index = faiss.read_index_binary(str(file))
    if index.ntotal != shard["count"] or index.d != bits:
        raise ValueError(f"{shard['codes']} has {index.ntotal} codes of {index.d} bits")
    return search_index.opened(index)
