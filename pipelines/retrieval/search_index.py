"""FAISS binary indexes in memory: build one from packed codes, search it."""

import hashlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np

CANDIDATES = 128  # that an HNSW index keeps in a search


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
        index.hnsw.efConstruction = 200
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
    return opened(index)


def search(index: faiss.IndexBinary, codes: np.ndarray, k: int, probes: int = 0, ef: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes of an index to each query; all queries get ``min(k, codes in the index)`` answers.

    An IVF index visits some of its lists. Queries that find too few codes there visit more lists, up to all.

    Args:
        codes: (queries, bits / 8) uint8.
        probes: lists that an IVF index visits first; 0 for an eighth of them.
        ef: candidates that an HNSW index keeps, k at least; 0 for ``CANDIDATES``.

    Returns:
        Hamming distances and positions in the index, (queries, answers) each.

    Raises:
        ValueError: ``probes`` is more than the index has lists, or it has none.
    """
    k = min(k, index.ntotal)
    if isinstance(index, faiss.IndexBinaryHNSW):
        index.hnsw.efSearch = max(ef or CANDIDATES, k)  # it stays set: the next search must not have this one's
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


def digest_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def opened(index: faiss.IndexBinary) -> Any:
    """An index as it is searched: a flat one gives ties in the order of their positions."""
    if isinstance(index, faiss.IndexBinaryFlat):
        index.use_heap = False  # type: ignore[attr-defined]
    return index
