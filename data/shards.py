"""Parquet shards: written by Ray Data in a seeded global shuffle, read by row range.

A domain is built in a staging folder, moved into place whole, and named in the manifest last: a reader, which goes by
the manifest, never sees a part of it.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.images import decode, resize_arrays
from data.manifest import Domain, Manifest, Split
from data.places import locked, move, open_parquet, read_table, remove, written
from data.readers import Chunk, Reader

ROWS_PER_FILE = 8192
SMALL = 64 << 20  # values of a domain up to which one process shards it by itself
RAW_LIMIT = 64  # pixels a side up to which images are stored raw by default


@dataclass(frozen=True)
class Layout:
    """How rows are stored: the manifest's ``store`` and ``shape``, the shuffle's seed, rows per file."""

    store: str
    shape: tuple[int, ...]
    seed: int
    rows_per_file: int = ROWS_PER_FILE

    def schema(self) -> pa.Schema:
        """The Parquet contract."""
        column = (
            pa.field("feature", pa.list_(pa.float32(), self.shape[0])) if self.store == "feature" else pa.field("image", pa.binary())
        )
        return pa.schema([("id", pa.string()), ("row", pa.int64()), column, ("label", pa.int32())])


def choose_layout(reader: Reader, manifest: Manifest | None, size: int, channels: int, store: str, seed: int) -> Layout:
    """The layout of a new domain: what the user asked for, else what the dataset has, else what the source has.

    Raises:
        ValueError: it does not fit the domains that are there.
    """
    if len(reader.native) == 1:
        layout = Layout("feature", reader.native, seed)
    else:
        there = manifest.shape if manifest and manifest.store != "feature" else None
        size = size or (there[1] if there else max(reader.native, default=224))
        channels = channels or (there[0] if there else reader.channels or 3)
        default = manifest.store if there and manifest else "raw" if size <= RAW_LIMIT else "encoded"
        layout = Layout(store or default, (channels, size, size), seed)
    if layout.store == "encoded" and reader.native:
        raise ValueError(f"{reader.domain}: --store encoded keeps files as they are, but the source holds arrays: use --store raw")
    if manifest:
        _check_fits(reader, manifest, layout)
    return layout


def _check_fits(reader: Reader, manifest: Manifest, layout: Layout) -> None:
    if (list(layout.shape), layout.store) != (manifest.shape, manifest.store):
        raise ValueError(
            f"domain {reader.domain!r} would be {layout.store} {list(layout.shape)}, but dataset {manifest.dataset!r} is "
            f"{manifest.store} {manifest.shape}: give the same --size, --channels and --store, or another --dataset"
        )
    if reader.classes and manifest.classes and manifest.classes != list(reader.classes):
        odd = sorted(set(reader.classes) ^ set(manifest.classes))
        raise ValueError(
            f"domain {reader.domain!r} has {len(reader.classes)} classes, dataset {manifest.dataset!r} has "
            f"{len(manifest.classes)}, and they differ ({', '.join(odd[:4]) or 'in order'}): the domains of a dataset share their classes"
        )


def _key(identity: str, seed: int) -> int:
    """Position of a row in the shuffle, 63 bits: a function of its id and the seed."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8, key=seed.to_bytes(8)).digest()) >> 1


class _Prepare:
    """Reads a chunk and brings its rows to the stored form; a row that cannot be read carries its ``error``."""

    def __init__(self, reader: Reader, layout: Layout, parts: dict[str, int], test_share: float) -> None:
        self.reader, self.layout, self.parts, self.test_share = reader, layout, parts, test_share

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        rows = [row for index in batch["chunk"] for row in self._rows(self.reader.chunks()[int(index)])]
        types = pa.schema([
            ("id", pa.string()), ("label", pa.int32()), ("content", pa.binary()),
            ("error", pa.string()), ("key", pa.int64()), ("part", pa.string()),
        ])  # fmt: skip
        return pa.Table.from_pylist(rows, schema=types)

    def _rows(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        for row in self.reader.read(chunk):
            key = _key(row.id, self.layout.seed)
            split = chunk.split
            if self.test_share and _key(row.id, self.layout.seed + 1) < self.test_share * 2**63:
                split = "test"
            content, error = self._stored(row.content)
            part = f"{split}/{key * self.parts[split] >> 63:05d}"
            yield {"id": row.id, "label": row.label, "content": content, "error": error, "key": key, "part": part}

    def _stored(self, content: bytes | np.ndarray) -> tuple[bytes, str]:
        shape = self.layout.shape
        try:
            if isinstance(content, bytes):
                array = decode(content, shape[0], shape[1])
                return (array.tobytes() if self.layout.store == "raw" else content), ""
        except ValueError as error:
            return b"", str(error)
        if self.layout.store == "feature":
            vector = content.astype(np.float32)
            return (vector.tobytes(), "") if np.isfinite(vector).all() else (b"", "a feature is not finite")
        return resize_arrays(content[None], shape[0], shape[1]).tobytes(), ""


class _Write:
    """Writes one part of the shuffle to a file and tells how many rows it has, and which were left out."""

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
        with written(self.folder / (part.replace("/", "-") + ".parquet")) as path:
            pq.write_table(table, path)
        rejected = [f"{i}\n{e}" for i, e in zip(bad["id"].to_pylist(), bad["error"].to_pylist(), strict=True)]
        return pa.table({"part": [part], "rows": [len(good)], "rejected": [rejected]})


class _Number:
    """Gives a part's rows their numbers, up to a limit, and its file its place; tells what is in it, and its digest."""

    def __init__(self, staging: Path, target: Path, limit: int) -> None:
        self.staging, self.target, self.limit = staging, target, limit

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        split, part = item["part"].split("/")
        table = read_table(self.staging / f"{split}-{part}.parquet")
        if self.limit:
            table = table.slice(0, max(0, self.limit - int(item["offset"])))
        numbers = pc.add(table["row"], int(item["offset"])) if len(table) else table["row"]
        table = table.set_column(1, "row", numbers)
        with written(self.target / f"split={split}" / f"part-{part}.parquet") as path:
            pq.write_table(table, path, row_group_size=2048)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        labels = table["label"].to_numpy()
        counts = np.bincount(labels[labels >= 0]).tolist()
        return {"part": item["part"], "rows": len(table), "labels": counts, "unlabelled": int((labels < 0).sum()), "sha256": digest}


def _write_parts(
    reader: Reader, layout: Layout, staging: Path, test_share: float, limit: int, start: Callable[[], object]
) -> list[dict[str, Any]]:  # fmt: skip
    """Shuffle and write all rows; a description of every part, in order, with its file's digest."""
    counts = dict(reader.counts)
    if test_share:
        total = sum(counts.values())
        counts = {"train": total, "test": max(1, int(total * test_share))}
    parts = {split: -(-count // layout.rows_per_file) for split, count in counts.items()}
    prepare, write = _Prepare(reader, layout, parts, test_share), _Write(layout, staging / "parts")
    large = sum(counts.values()) * int(np.prod(layout.shape)) > SMALL
    if large:
        start()
    done = sorted((_shuffle if large else _shuffle_here)(len(reader.chunks()), prepare, write, sum(parts.values())), key=lambda item: item["part"])
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


def _shuffle(chunks: int, prepare: _Prepare, write: _Write, parts: int) -> list[dict[str, Any]]:
    """Prepare all chunks and write all parts, on Ray Data."""
    import ray.data  # noqa: PLC0415  readers of shards do without Ray

    items = ray.data.from_items([{"chunk": index} for index in range(chunks)], override_num_blocks=min(chunks, 200))
    grouped = items.map_batches(prepare.__call__, batch_size=1).groupby("part", num_partitions=min(parts, 200))
    return grouped.map_groups(write.__call__, batch_format="pyarrow").take_all()


def _each(items: list[dict[str, Any]], number: _Number) -> list[dict[str, Any]]:
    """Number all parts, on Ray Data."""
    import ray.data  # noqa: PLC0415

    return ray.data.from_items(items).map(number.__call__).take_all()


def _shuffle_here(chunks: int, prepare: _Prepare, write: _Write, parts: int) -> list[dict[str, Any]]:
    """The same in this process, which is done with few rows before Ray has begun."""
    rows = pa.concat_tables([prepare({"chunk": np.array([index])}) for index in range(chunks)])
    written = [write(rows.filter(pc.equal(rows["part"], part))) for part in rows["part"].unique()]
    return [row for table in written for row in table.to_pylist()]


def _describe(reader: Reader, parts: list[dict[str, Any]], classes: int) -> Domain:
    domain = Domain(reader.origin, {})
    for item in parts:
        name, part = item["part"].split("/")
        split = domain.splits.setdefault(name, Split(0, [0] * classes, 0, []))
        split.rows += int(item["rows"])
        split.unlabelled += int(item["unlabelled"])
        for label, count in enumerate(item["labels"]):
            split.labels[label] += int(count)
        path = f"domain={reader.domain}/split={name}/part-{part}.parquet"
        split.files.append({"path": path, "rows": int(item["rows"]), "sha256": item["sha256"]})
        for line in item["rejected"]:
            identity, _, reason = line.partition("\n")
            domain.rejected.append({"id": identity, "reason": reason})
    return domain


def write_domain(
    reader: Reader, root: Path, *, size: int = 0, channels: int = 0, store: str = "", seed: int = 0,
    test_share: float = 0.0, limit: int = 0, strict: bool = False, replace: bool = False, start: Callable[[], object] = lambda: None,
) -> Manifest:  # fmt: skip
    """Write a domain's shards and name it in the dataset's manifest.

    Args:
        root: the dataset's folder, made where it is not.
        size, channels, store: see :func:`choose_layout`; 0 and "" for what fits.
        test_share: share of the rows that become split ``test``, chosen by their ids; only for sources without one.
        limit: rows of a split at most, the first of its shuffle; 0 for all.
        strict: an unreadable row is an error.
        replace: write the domain anew where it exists.
        start: starts Ray, which is used for a domain of more than a few rows.

    Raises:
        ValueError: the domain does not fit the dataset, is there already, or (``strict``) has an unreadable row.
    """
    manifest = Manifest.read(root) if (root / "manifest.json").exists() else None
    if manifest and reader.domain in manifest.domains and not replace:
        raise ValueError(f"dataset {root.name!r} already has domain {reader.domain!r}: give --replace to write it anew")
    if test_share and "test" in reader.counts:
        raise ValueError(f"{reader.domain} has a test split of its own: leave --test-share out")
    others = manifest if manifest and set(manifest.domains) - {reader.domain} else None
    layout = choose_layout(reader, others, size, channels, store, seed)
    created = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    staging = root / f".staging-{uuid.uuid4().hex[:8]}"
    try:
        classes = list(reader.classes) or (manifest.classes if manifest else [])
        parts = _write_parts(reader, layout, staging, test_share, limit, start)
        domain = _describe(reader, parts, len(classes))
        if strict and domain.rejected:
            first = domain.rejected[0]
            raise ValueError(f"{len(domain.rejected)} rows cannot be read, the first {first['id']!r} ({first['reason']})")
        if not any(split.rows for split in domain.splits.values()):
            first = domain.rejected[0]
            raise ValueError(f"{reader.domain}: not one row can be read; the first is {first['id']!r} ({first['reason']})")
        with locked(root / ".lock"):
            return _commit(root, staging / "domain", reader, layout, domain, classes)
    finally:
        remove(staging)
        if created and not (root / "manifest.json").exists():
            remove(root)


def _commit(root: Path, built: Path, reader: Reader, layout: Layout, domain: Domain, classes: list[str]) -> Manifest:
    """Move a built domain into place, then name it in the manifest as it stands now."""
    fresh = Manifest(root.name, classes, layout.store, list(layout.shape), layout.seed)
    manifest = Manifest.read(root) if (root / "manifest.json").exists() else fresh
    if set(manifest.domains) - {reader.domain}:
        _check_fits(reader, manifest, layout)  # another ingest may have been first
    else:
        manifest.store, manifest.shape, manifest.classes = layout.store, list(layout.shape), classes
    place = root / f"domain={reader.domain}"
    if reader.domain in manifest.domains:  # from here until the new manifest, the domain does not exist
        del manifest.domains[reader.domain]
        manifest.write(root)
    remove(place)
    move(built, place)
    manifest.domains[reader.domain] = domain
    manifest.classes = manifest.classes or classes
    for split in (split for each in manifest.domains.values() for split in each.splits.values()):
        split.labels = split.labels or [0] * len(manifest.classes)  # domains without labels may have come first
    manifest.write(root)
    return manifest


def read_rows(
    root: Path, manifest: Manifest, domain: str, split: str, start: int = 0, stop: int | None = None, *,
    labels: bool = True, ids: bool = False, order: list[int] | None = None,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Record batches of the rows ``start`` to ``stop`` of a split, in row order (or files in a given ``order``).

    Without ``labels`` the label column is not read at all.

    Raises:
        ValueError: a shard is missing or not what the manifest says.
    """
    files = manifest.split(domain, split).files
    ends = list(accumulate(file["rows"] for file in files))
    stop = ends[-1] if stop is None else stop
    columns = ["row", "feature" if manifest.store == "feature" else "image"] + ["label"] * labels + ["id"] * ids
    for index in order if order is not None else range(len(files)):
        first, end = ends[index] - files[index]["rows"], ends[index]
        if end <= start or first >= stop:
            continue
        path = root / files[index]["path"]
        try:
            with open_parquet(path) as file:
                if file.metadata.num_rows != files[index]["rows"]:
                    raise ValueError(f"{path} has {file.metadata.num_rows} rows, the manifest says {files[index]['rows']}: ingest the domain again")
                stored = Layout(manifest.store, tuple(manifest.shape), manifest.seed).schema()
                if any(name not in file.schema_arrow.names or file.schema_arrow.field(name).type != stored.field(name).type for name in columns):
                    raise ValueError(f"shard {path} has not the columns of the manifest's {manifest.store}: ingest the domain again")
                for batch in file.iter_batches(batch_size=2048, columns=columns):
                    if reason := _wrong(batch, manifest, first):
                        raise ValueError(f"shard {path} is damaged ({reason}): ingest the domain again")
                    low, high = max(0, start - first), min(len(batch), stop - first)
                    if high > low:
                        yield batch.slice(low, high - low)
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"shard {path} cannot be read ({str(error).splitlines()[0]}): ingest the domain again") from error


def _wrong(batch: pa.RecordBatch, manifest: Manifest, first: int) -> str:
    """What a shard's rows from number ``first`` on have that no ingest wrote; "" where all is well."""
    if any(column.null_count for column in batch.columns):
        return "a value is missing"
    if not np.array_equal(batch.column("row").to_numpy(), np.arange(first, first + len(batch))):
        return "its rows are not numbered in order"
    if "label" in batch.schema.names:
        labels = batch.column("label").to_numpy()
        if len(labels) and not -1 <= labels.min() <= labels.max() < max(len(manifest.classes), 1):
            return "a label is of no class"
    if manifest.store == "raw" and len(batch) and pc.min_max(pc.binary_length(batch.column("image"))) != _both(int(np.prod(manifest.shape))):
        return "an image has another size"
    return ""


def _both(length: int) -> pa.StructScalar:
    return pa.scalar({"min": length, "max": length}, pa.struct([("min", pa.int32()), ("max", pa.int32())]))


def to_arrays(batch: pa.RecordBatch, manifest: Manifest) -> np.ndarray:
    """The images (n, channels, h, w) uint8 or features (n, d) float32 of a record batch."""
    if manifest.store == "feature":
        return batch.column("feature").flatten().to_numpy().reshape(-1, manifest.shape[0])
    images = batch.column("image").to_pylist()
    if manifest.store == "raw":
        return np.frombuffer(b"".join(images), np.uint8).reshape(-1, *manifest.shape)
    return np.stack([decode(each, manifest.shape[0], manifest.shape[1]) for each in images])
