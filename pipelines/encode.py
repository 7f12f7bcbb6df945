"""Command: encode a folder of images or a dataset to Parquet files of codes, with Ray Data if there are many."""


import dataclasses
import functools
import json
import uuid
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.filesystem import atomic_write, move, remove, to_path
from data.images import SUFFIXES, decode
from data.manifest import Manifest
from data.readers.base import printable
from data.readers.folder import image_files
from data.shards import read_rows, to_arrays
from pipelines.console import cluster
from pipelines.console.config import option, positional, required
from pipelines.registry.encoders import Encoder, open_encoder, registry_uri
from pipelines.retrieval.code_files import SCHEMA

BATCH, PART, FEW = 512, 65536, 20_000  # rows per call of the encoder; maximum rows per file of codes; rows up to which Ray is not worth its start


@dataclass
class Config:
    """Options of ``hashbridge encode``."""

    model: str = positional("models:/NAME@ALIAS, or a run's id")
    input: str = positional("a dataset's folder, a folder of images, or an image")
    out: str = required("folder of the codes, which must not exist yet")
    domain: str = option("", "domain of a dataset (default: all)")
    split: str = option("", "split of a dataset (default: all)")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    workers: int = option(0, "encoders at a time, by Ray Data (default: one; this process alone for few rows)")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}, but must not be negative")


class _Encode:
    """Encodes one part after another and writes the codes of each to its own file.

    A part's file is named by its number and written atomically. When Ray encodes a part again after a node failed, it writes the
    same file again, so each row appears exactly once.
    """

    def __init__(self, config: Config, staging: str, encoder: Encoder | None = None) -> None:
        self.encoder = encoder or open_encoder(config.model, config.storage, config.tracking)
        self.root, self.staging = to_path(config.input), to_path(staging)
        self.meta = {b"bits": str(self.encoder.bits).encode(), b"model": config.model.encode()}
        if (self.root / "manifest.json").exists():
            self.meta[b"classes"] = json.dumps(Manifest.read(self.root).classes).encode()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        lost: list[str] = []
        tables = list(self._rows(item["split"], item["start"], item["stop"]) if item["split"] else self._files(json.loads(item["files"]), lost))
        table = pa.concat_tables(tables or [SCHEMA.empty_table()]).replace_schema_metadata(self.meta)
        with atomic_write(self.staging / f"part-{item['part']:05d}.parquet") as file:
            pq.write_table(table, file)
        return {"part": item["part"], "codes": len(table), "lost": json.dumps(lost)}

    def _rows(self, name: str, start: int, stop: int) -> Iterator[pa.Table]:
        manifest, origin = Manifest.read(self.root), f"{self.root.resolve()}#{name}"
        domain, split = name.rsplit("/", 1)
        for batch in read_rows(self.root, manifest, domain, split, start, stop, ids=True):
            origins = [f"{origin}#{row}" for row in batch.column("row").to_pylist()]
            yield self._table(batch.column("id").to_pylist(), batch.column("label").to_numpy(), to_arrays(batch, manifest), origins)

    def _files(self, names: list[str], lost: list[str]) -> Iterator[pa.Table]:
        folder = self.root.is_dir()
        for block in (names[start : start + BATCH] for start in range(0, len(names), BATCH)):
            read: dict[str, np.ndarray] = {}
            for name in block:
                try:
                    content = (self.root / name if folder else self.root).read_bytes()
                    read[name] = decode(content, self.encoder.shape[0], self.encoder.shape[1])
                except (ValueError, OSError) as error:
                    lost.append(f"{printable(name)}: {error}")
            if read:
                origins = [printable(str((self.root / name if folder else self.root).resolve())) for name in read]
                yield self._table([printable(name) for name in read], np.full(len(read), -1), np.stack([*read.values()]), origins)

    def _table(self, ids: list[str], labels: np.ndarray, x: np.ndarray, origins: list[str]) -> pa.Table:
        codes = np.concatenate([self.encoder(x[start : start + BATCH]) for start in range(0, len(x), BATCH)])
        return pa.table({"id": ids, "label": labels.astype(np.int32), "code": [row.tobytes() for row in codes], "origin": origins}, schema=SCHEMA)


@functools.lru_cache(maxsize=1)
def _loaded(staging: str, *options: Any) -> _Encode:
    """The encoder of a config, given as its values; loaded once per run of the command by each of Ray's worker processes.

    Worker processes are reused, and an alias may move between two runs. ``staging`` differs in each run, so it keeps the cache apart.
    """
    return _Encode(Config(*options), staging)


def _encode(item: dict[str, Any], staging: str, config: Config) -> dict[str, Any]:
    return _loaded(staging, *astuple(config))(item)


def _size(rows: int, workers: int) -> int:
    """Rows of a part: small enough for several parts per encoder, in whole batches."""
    return min(PART, max(BATCH, -(-rows // (4 * max(1, workers) * BATCH)) * BATCH))


def _dataset_items(config: Config, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    manifest = Manifest.read(to_path(config.input))
    if tuple(manifest.shape) != tuple(shape):
        raise ValueError(f"{config.model} takes rows of shape {list(shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if config.domain and config.domain not in manifest.domains:
        raise ValueError(f"dataset {manifest.dataset!r} has no domain {config.domain!r}: it has {', '.join(manifest.domains)}")
    domains = [config.domain] if config.domain else list(manifest.domains)
    counts = {f"{d}/{s}": manifest.split(d, s).rows for d in domains for s in ([config.split] if config.split else manifest.domains[d].splits)}
    size = _size(sum(counts.values()), config.workers)
    return [
        {"split": name, "start": start, "stop": min(start + size, rows), "files": ""} for name, rows in counts.items() for start in range(0, rows, size)
    ]


def _file_items(path: Path, workers: int) -> list[dict[str, Any]]:
    names = [path.name] if path.is_file() else [str(each.relative_to(path)) for each in image_files(path)]
    if not names:
        raise ValueError(f"{path} contains no image file ({', '.join(sorted(SUFFIXES))}) and is not a dataset")
    size = _size(len(names), workers)
    return [{"split": "", "start": 0, "stop": 0, "files": json.dumps(names[start : start + size])} for start in range(0, len(names), size)]


def run(config: Config) -> dict[str, Any]:
    """Encode; returns the number of codes and the images left out."""
    path, out = to_path(config.input), to_path(config.out)
    if not path.exists():
        raise ValueError(f"no file or folder {config.input!r} to encode")
    if out.exists():
        raise ValueError(f"{out} exists already: give another --out, or remove it")
    encoder = open_encoder(config.model, config.storage, config.tracking)
    dataset = (path / "manifest.json").exists()
    if not dataset and len(encoder.shape) != 3:
        raise ValueError(f"{config.model} takes feature vectors, {path} holds files: ingest the features and give the dataset")
    items = _dataset_items(config, encoder.shape) if dataset else _file_items(path, config.workers)
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    absolute = dataclasses.replace(  # workers may have another working folder and environment
        config, input=str(path.resolve()), storage=str(to_path(config.storage).resolve()), tracking=registry_uri(config.model, config.storage, config.tracking)
    )
    try:
        told = _encode_all([item | {"part": part} for part, item in enumerate(items)], staging, absolute, encoder)
        count, lost = sum(item["codes"] for item in told), [line for item in sorted(told, key=_part) for line in json.loads(item["lost"])]
        if not count:
            raise ValueError(f"no image can be read; the first: {lost[0]}")
        for partial in staging.glob(".*"):  # of an encoder that was killed while it wrote
            partial.unlink()
        move(staging, out)
    except Exception as error:
        raise cluster.user_error(error) from error
    finally:
        remove(staging)
    for line in lost[:5]:
        print(f"  left out {line}")
    print(f"{count:,} codes of {encoder.bits} bits in {out}; {len(lost)} images left out")
    return {"out": str(out), "codes": count, "bits": encoder.bits, "rejected": lost}


def _encode_all(items: list[dict[str, Any]], staging: Path, config: Config, encoder: Encoder) -> list[dict[str, Any]]:
    """Encode all parts, few rows with this process's encoder; returns what ``_Encode`` says of each."""
    rows = sum(len(json.loads(item["files"])) if item["files"] else item["stop"] - item["start"] for item in items)
    if not config.workers and rows <= FEW:
        return list(map(_Encode(config, str(staging.resolve()), encoder), items))
    cluster.connect()
    import ray.data  # noqa: PLC0415

    parts = ray.data.from_items(items, override_num_blocks=len(items))
    return parts.map(functools.partial(_encode, staging=str(staging.resolve()), config=config), concurrency=max(1, config.workers)).take_all()


def _part(item: dict[str, Any]) -> int:
    return item["part"]
