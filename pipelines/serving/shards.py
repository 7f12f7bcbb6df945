"""Answers from shards of an index: keeps those of the last versions open, so that each request gets the version that it began with."""

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from data.filesystem import local_copy, to_path
from pipelines.retrieval import search_index
from pipelines.retrieval.sharded_index import Record, nearest_places, read_shard
from pipelines.serving.rows import MappedRows

VERSIONS, FILTERS = 3, 8  # versions of an index, and filtered indexes of a shard, that stay open


class Place(NamedTuple):
    """A shard of a version of an index: the index's ``folder``, its manifest without shards, and the shard's entry of it."""

    folder: str
    manifest: Record
    entry: Record

    @property
    def key(self) -> str:
        """What no other shard has."""
        return f"{self.entry['sha256']} {self.entry['sha256_rows']}"


class Filter(NamedTuple):
    """What answers must be: of a label (None for any) and of a domain ("" for any)."""

    label: int | None = None
    domain: str = ""


class Query(NamedTuple):
    """A packed code, and what is asked for."""

    code: bytes
    k: int
    filter: Filter = Filter()


Found = tuple[list[int], list[Record]]  # Hamming distances and rows, nearest first, ties by id


class OpenShard:
    """A shard that is open for searches."""

    def __init__(self, place: Place) -> None:
        """Raises ValueError or OSError if it cannot be read."""
        self.index = read_shard(to_path(place.folder), place.entry, place.manifest["bits"])
        with local_copy(to_path(place.folder) / place.entry["rows"]) as file:
            self.rows = MappedRows(Path(file))
        self.filtered: OrderedDict[Filter, tuple[faiss.IndexBinary | None, np.ndarray]] = OrderedDict()

    def search(self, queries: list[Query], parameters: dict[str, int]) -> list[Found]:
        """The nearest rows to each query; queries of the same filter and k are searched together.

        Args:
            parameters: of the manifest, which say how widely an approximate index is searched.
        """
        answers: dict[int, Found] = {}
        groups: dict[tuple[int, Filter], list[int]] = {}
        for number, query in enumerate(queries):
            groups.setdefault((query.k, query.filter), []).append(number)
        for (k, wanted), members in groups.items():
            codes = np.frombuffer(b"".join(queries[each].code for each in members), np.uint8).reshape(len(members), -1)
            distances, places = self._nearest(codes, k, wanted, parameters)
            rows = iter(self.rows.take(places[places >= 0]))
            for number, far, near in zip(members, distances.tolist(), places.tolist(), strict=True):
                kept = [distance for distance, place in zip(far, near, strict=True) if place >= 0]
                answers[number] = kept, [next(rows) for _ in kept]
        return [answers[number] for number in range(len(queries))]

    def _nearest(self, codes: np.ndarray, k: int, wanted: Filter, parameters: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Distances and places, as ``nearest_places`` gives them; with a filter all rows that match are compared."""
        if wanted == Filter():
            return nearest_places(self.index, codes, k, parameters)
        if wanted not in self.filtered:
            places = self.rows.matching(*wanted)
            self.filtered[wanted] = (search_index.build(self.rows.codes(places), "flat") if len(places) else None), places
            if len(self.filtered) > FILTERS:
                self.filtered.popitem(last=False)
        index, places = self.filtered[wanted]
        self.filtered.move_to_end(wanted)
        if index is None:
            return np.empty((len(codes), 0), np.int64), np.empty((len(codes), 0), np.int64)
        distances, found = search_index.search(index, codes, k)
        return distances, places[found]


class Shards:
    """Opens shards when they are first asked for. What cannot be read is answered by a text, not raised."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, OpenShard] = OrderedDict()
        self.opening: dict[str, asyncio.Task[OpenShard]] = {}

    async def search(self, places: list[Place], queries: list[Query]) -> list[list[Found]] | str:
        """The answers of each shard to each query; a text if a shard cannot be read."""
        shards = await self._opened(places)
        return shards if isinstance(shards, str) else [
            shard.search(queries, place.manifest["parameters"]) for shard, place in zip(shards, places, strict=True)
        ]

    async def about(self, places: list[Place]) -> Record | str:
        """``labels`` and ``domains`` that the rows of shards have; a text if a shard cannot be read."""
        shards = await self._opened(places)
        if isinstance(shards, str):
            return shards
        return {
            "labels": sorted({int(label) for shard in shards for label in np.unique(shard.rows.labels)}),
            "domains": sorted({domain for shard in shards for domain in shard.rows.domains}),
        }

    async def find(self, places: list[Place], name: str) -> Record | str | None:
        """The row of an id, with its ``code``; None if it is not here; a text if a shard cannot be read."""
        shards = await self._opened(places)
        if isinstance(shards, str):
            return shards
        for shard in shards:
            place = shard.rows.find(name)
            if place is not None:
                return shard.rows.take(np.array([place]))[0] | {"code": shard.rows.codes(np.array([place])).tobytes()}
        return None

    async def some(self, places: list[Place], wanted: Filter, count: int, seed: int) -> list[Record] | str:
        """Rows that match a filter, drawn at random, at most ``count`` of each shard; a text if a shard cannot be read."""
        shards = await self._opened(places)
        if isinstance(shards, str):
            return shards
        rows: list[Record] = []
        for number, shard in enumerate(shards):
            matching, random = shard.rows.matching(*wanted), np.random.default_rng((seed, number))
            rows += shard.rows.take(random.choice(matching, min(count, len(matching)), replace=False))
        return rows

    async def _opened(self, places: list[Place]) -> list[OpenShard] | str:
        try:
            shards = [self.open.get(place.key) or await self._open(place) for place in places]
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0][:300]
        for place, shard in zip(places, shards, strict=True):
            self.open[place.key] = shard  # another request may have closed it while this one waited for others
            self.open.move_to_end(place.key)
        while len(self.open) > VERSIONS * max(1, len(places)):
            self.open.popitem(last=False)
        return shards

    async def _open(self, place: Place) -> OpenShard:
        """Open a shard once, however many ask for it, in a thread, so that others are answered meanwhile."""
        key = place.key
        if key not in self.opening:
            self.opening[key] = asyncio.create_task(asyncio.to_thread(OpenShard, place))
        try:
            shard = await asyncio.shield(self.opening[key])
        finally:
            if key in self.opening and self.opening[key].done():
                del self.opening[key]
        self.open[key] = shard
        return shard
