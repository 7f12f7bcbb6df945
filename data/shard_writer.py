"""Writes a reader's rows to Parquet shards in a seeded global shuffle: in this process, or with Ray Data if there are many."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.filesystem import atomic_write, read_table
from data.images import Brightness, brightness, decode, resize_arrays, to_jpeg, with_range
from data.layout import DROPPED, Layout
from data.readers.base import Chunk, Reader

GROUP = 64 << 20  # bytes of a row group at most, unless it has 64 rows: what a reader holds at a time
SPARE = 200  # rows beyond a limit, and beyond a tenth of it, that are read in place of those that cannot be
LAST_KEY = 2**63 - 1
SMALL = 64 << 20  # number of values (pixels or features) up to which this process writes a domain without Ray


def _key(identity: str, seed: int, use: bytes = b"") -> int:
    """63 bits that depend only on a row's id, the seed and the use: by default the row's position in the shuffle."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8, key=seed.to_bytes(8), person=use).digest()) >> 1


def _digest(content: bytes | np.ndarray) -> int:
    """A 63-bit digest of a row as it was read, by which exact copies are found."""
    data = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1


class _Prepare:
    """Reads a chunk and converts its rows to the stored form; for an unreadable row the column ``error`` says why."""

    def __init__(
        self, reader: Reader, layout: Layout, parts: dict[str, int], last: dict[str, int], test: float | frozenset[str], places: list[int],
        values: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Args:
        last: by split, the position in the shuffle beyond which rows are left out before they are decoded.
        test: share of the rows that go to split ``test``, or their ids; 0 keeps the reader's splits.
        places: the dataset's label of each of the reader's labels.
        values: lowest and highest value of the images, mapped to 0 and 255; None for those of their type.
        """
        self.values, self.last = values, last
        self.reader, self.layout, self.parts, self.test, self.places = reader.without_listing(), layout, parts, test, places

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        rows = [row for chunk in batch["chunk"] for row in self._rows(Chunk(*json.loads(chunk)))]
        types = pa.schema([
            ("id", pa.string()), ("label", pa.int32()), ("content", pa.binary()),
            ("error", pa.string()), ("key", pa.int64()), ("part", pa.string()), ("digest", pa.int64()),
            *((name, pa.float64()) for name in Brightness._fields),
        ])  # fmt: skip
        return pa.Table.from_pylist(rows, schema=types)

    def _rows(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        for row in self.reader.read(chunk):
            key = _key(row.id, self.layout.seed)
            split = self._split(row.id) if self.test else chunk.split
            if key > self.last[split]:
                continue
            seen = None if row.error else brightness(row.content)
            read = row.content if not self.values or seen is None else with_range(row.content, *self.values)
            content, error = (b"", row.error) if row.error else self._stored(read)
            part = f"{split}/{key * self.parts[split] >> 63:05d}"
            label = self.places[row.label] if row.label >= 0 else -1
            if label == DROPPED:
                continue
            values = {"id": row.id, "label": label, "content": content, "error": error, "key": key, "part": part, "digest": _digest(row.content)}
            yield values | (seen._asdict() if seen else dict.fromkeys(Brightness._fields))

    def _split(self, identity: str) -> str:
        test = self.test
        drawn = identity in test if isinstance(test, frozenset) else _key(identity, self.layout.seed, b"test") < test * 2**63
        return "test" if drawn else "train"

    def _stored(self, content: bytes | np.ndarray) -> tuple[bytes, str]:
        shape = self.layout.shape
        try:
            if isinstance(content, bytes):
                array = decode(content, shape[0], shape[1])
                return (content if self.layout.store == "encoded" else self._converted(array)), ""
        except ValueError as error:
            return b"", str(error)
        if self.layout.store == "feature":
            vector = content.astype(np.float32)
            return (vector.tobytes(), "") if np.isfinite(vector).all() else (b"", "a feature is not finite")
        return self._converted(resize_arrays(content[None], shape[0], shape[1])[0]), ""

    def _converted(self, image: np.ndarray) -> bytes:
        return to_jpeg(image) if self.layout.store == "jpeg" else image.tobytes()


class _Write:
    """Writes one part of the shuffle to a file; returns its number of rows and the rejected rows."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout, self.folder = layout, folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        part = rows["part"][0].as_py()
        rows = rows.sort_by([("key", "ascending"), ("id", "ascending")])
        good = rows.filter(pc.equal(rows["error"], "")).combine_chunks()
        bad = rows.filter(pc.not_equal(rows["error"], ""))
        if self.layout.store == "feature":
            flat = np.frombuffer(b"".join(good["content"].to_pylist()), np.float32)
            content: Any = pa.FixedSizeListArray.from_arrays(pa.array(flat), self.layout.shape[0])
        else:
            content = good["content"]
        order = pa.array(range(len(good)), pa.int64())
        table = pa.Table.from_arrays([good["id"], order, content, good["label"]], schema=self.layout.schema())
        with atomic_write(self.folder / (part.replace("/", "-") + ".parquet")) as path:
            pq.write_table(table, path)
        rejected = [f"{i}\n{e}" for i, e in zip(bad["id"].to_pylist(), bad["error"].to_pylist(), strict=True)]
        seen = np.stack([good["digest"].to_numpy(), good["label"].to_numpy().astype(np.int64)])
        return pa.table({"part": [part], "rows": [len(good)], "rejected": [rejected], "seen": [seen.tobytes()], "light": [_light(good)]})


def _light(rows: pa.Table) -> str:
    """What a domain's notes need to know of its images' brightness, as JSON: the largest values, the images by a guessed white, those with values beyond."""
    found = [Brightness(*row) for row in zip(*(rows[name].to_pylist() for name in Brightness._fields), strict=True) if row[-1] is not None]
    guessed = Counter(f"{each.white:g}" for each in found if each.guessed and each.brightest > 0)
    largest = {name: max((getattr(each, name) for each in found), default=0.0) for name in ("brightest", "white")}
    return json.dumps(largest | {"guessed": guessed, "cut": sum(each.cut for each in found)})


class _Number:
    """Numbers the rows of a part, cuts them at the limit, and writes the final file; returns row counts and digest."""

    def __init__(self, staging: Path, target: Path, limit: int) -> None:
        self.staging, self.target, self.limit = staging, target, limit

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        split, part = item["part"].split("/")
        table = read_table(self.staging / f"{split}-{part}.parquet")
        if self.limit:
            table = table.slice(0, max(0, self.limit - int(item["offset"])))
        numbers = pc.add(table["row"], int(item["offset"])) if len(table) else table["row"]
        table = table.set_column(1, "row", numbers)
        with atomic_write(self.target / f"split={split}" / f"part-{part}.parquet") as path:
            pq.write_table(table, path, row_group_size=max(64, min(2048, GROUP * len(table) // max(1, table.nbytes))))
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        labels = table["label"].to_numpy()
        counts = np.bincount(labels[labels >= 0]).tolist()
        return {"part": item["part"], "rows": len(table), "labels": counts, "unlabelled": int((labels < 0).sum()), "sha256": digest}


def draw_queries(reader: Reader, count: int, seed: int, places: list[int]) -> frozenset[str]:
    """Ids of ``count`` rows of each class, drawn by the seed from all splits: the query set of hashing's protocols. Reads every row once.

    Args:
        places: the dataset's label of each of the reader's labels.

    Raises:
        ValueError: the rows have no labels, or a class has none left to train on.
    """
    keys: dict[int, list[tuple[int, str]]] = {}
    for chunk in reader.chunks():
        for row in reader.read(chunk):
            if not row.error and row.label >= 0 and places[row.label] != DROPPED:
                keys.setdefault(row.label, []).append((_key(row.id, seed, b"test"), row.id))
    if not keys:
        raise ValueError(f"{reader.domain} has no labels, by which --test-per-class could draw")
    for label, drawn in keys.items():
        if len(drawn) <= count:
            raise ValueError(f"class {reader.classes[label]!r} of {reader.domain} has {len(drawn)} rows: --test-per-class {count} leaves none to train on")
    return frozenset(identity for drawn in keys.values() for _, identity in nsmallest(count, drawn))


def write_parts(
    reader: Reader, layout: Layout, staging: Path, test: float | frozenset[str], limit: int, start: Callable[[], object], places: list[int],
    values: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Shuffle and write all rows; returns a description of each part, in order, with the digest of its file.

    Args:
        test: as in ``_Prepare``.
    """
    counts = dict(reader.counts)
    if test:
        total = sum(counts.values())
        counts = {"train": total, "test": len(test) if isinstance(test, frozenset) else max(1, int(total * test))}
    parts = {split: -(-count // layout.rows_per_file) for split, count in counts.items()}
    write = _Write(layout, staging / "parts")
    large = sum(counts.values()) * int(np.prod(layout.shape)) > SMALL
    if large:
        start()
    chunks = [json.dumps(chunk) for chunk in reader.chunks()]

    def shuffled(last: dict[str, int]) -> list[dict[str, Any]]:
        prepare = _Prepare(reader, layout, parts, last, test, places, values)
        return sorted((_shuffle if large else _shuffle_here)(chunks, prepare, write, sum(parts.values())), key=lambda item: item["part"])

    last = _last_keys(counts, limit if DROPPED not in places else 0, test)
    done = shuffled(last)
    if any(last[split] < LAST_KEY and _rows_of(done, split) < limit for split in counts):
        done = shuffled(dict.fromkeys(counts, LAST_KEY))  # so many rows cannot be read that others are missing
    offsets: dict[str, int] = {}
    for item in done:
        split = item["part"].split("/")[0]
        item["offset"] = offsets.get(split, 0)
        offsets[split] = item["offset"] + item["rows"]
    done = [item for item in done if not limit or item["offset"] < limit]
    items = [{"part": item["part"], "offset": item["offset"]} for item in done]
    number = _Number(staging / "parts", staging / "domain", limit)
    told = {item["part"]: item for item in (_each(items, number) if large else map(number, items))}
    return [item | told[item["part"]] for item in done]


def _last_keys(counts: dict[str, int], limit: int, test: float | frozenset[str]) -> dict[str, int]:
    """By split, the position in the shuffle up to which some more rows than the limit lie; all if there is no limit."""
    left = 0 if not test else len(test) if isinstance(test, frozenset) else int(counts["train"] * test)
    there = counts | ({"train": counts["train"] - left} if test else {})
    return {split: min(LAST_KEY, LAST_KEY * (limit + limit // 10 + SPARE) // max(1, rows)) if limit else LAST_KEY for split, rows in there.items()}


def _rows_of(parts: list[dict[str, Any]], split: str) -> int:
    return sum(int(item["rows"]) for item in parts if item["part"].startswith(f"{split}/"))


def _shuffle(chunks: list[str], prepare: _Prepare, write: _Write, parts: int) -> list[dict[str, Any]]:
    """Prepare all chunks and write all parts with Ray Data."""
    import ray.data  # noqa: PLC0415  reading shards does not need Ray

    items = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=min(len(chunks), 200))
    grouped = items.map_batches(prepare.__call__, batch_size=1).groupby("part", num_partitions=min(parts, 200))
    return grouped.map_groups(write.__call__, batch_format="pyarrow").take_all()


def _each(items: list[dict[str, Any]], number: _Number) -> list[dict[str, Any]]:
    """Number all parts with Ray Data."""
    import ray.data  # noqa: PLC0415

    return ray.data.from_items(items).map(number.__call__).take_all()


def _shuffle_here(chunks: list[str], prepare: _Prepare, write: _Write, parts: int) -> list[dict[str, Any]]:
    """Prepare all chunks and write all parts in this process, which is faster than starting Ray for few rows."""
    rows = pa.concat_tables([prepare({"chunk": np.array([chunk])}) for chunk in chunks])
    written = [write(rows.filter(pc.equal(rows["part"], part))) for part in rows["part"].unique()]
    return [row for table in written for row in table.to_pylist()]
