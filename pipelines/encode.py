"""Command: encode a folder of images or a dataset to Parquet files of codes, with Ray Data if there are many."""


import dataclasses
import json
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.decoding import batch_rows, split_name
from data.filesystem import atomic_write, move, remove, to_path
from data.images import SUFFIXES, one_white
from data.manifest import Manifest
from data.readers.folder import image_files
from models.allocator import keep_freed_memory
from pipelines.console import cluster
from pipelines.console.config import NO_RANGE, RANGE, option, positional, required, value_range
from pipelines.parts import Decode, on_ray
from pipelines.registry.encoders import Encoder, found_by_workers, open_encoder, registry_uri, resolve
from pipelines.retrieval.code_files import SCHEMA

PART, FEW = 2**26, 20_000  # values of a part, whose codes are one file, at most; rows up to which Ray is not worth its start


@dataclass
class Config:
    """Options of ``hashbridge encode``."""

    model: str = positional("models:/NAME@ALIAS, or a run's id")
    input: str = positional("a dataset's folder, a folder of images, or an image")
    out: str = required("folder of the codes, which must not exist yet")
    domain: str = option("", "domain of a dataset (default: all)")
    split: str = option("", "split of a dataset (default: all)")
    range: str = option("", RANGE)
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    workers: int = option(0, "encoders at a time, by Ray Data (default: one; this process alone for few rows)")
    gpu: bool = option(False, "encode on the GPUs of the Ray cluster, one per encoder; other tasks decode the images")

    def __post_init__(self) -> None:
        value_range(self.range)
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}, but must not be negative")


class _Encode:
    """Encodes one part after another and writes the codes of each to its own file.

    A part's file is named by its number and written atomically. When Ray encodes a part again after a node failed, it writes the
    same file again, so each row appears exactly once.
    """

    def __init__(self, config: Config, staging: str, encoder: Encoder | None = None, threads: int | None = None) -> None:
        keep_freed_memory()
        rows = _dataset(to_path(config.input))
        self.encoder = encoder or open_encoder(config.model, config.storage, config.tracking, config.gpu, rows)
        self.decode, self.staging = Decode(config.input, self.encoder.shape, threads, value_range(config.range)), to_path(staging)
        self.meta = {b"bits": str(self.encoder.bits).encode(), b"model": config.model.encode()}
        if rows:
            self.meta[b"classes"] = json.dumps(rows.classes).encode()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode a part and write its codes."""
        tables, lost, whites = [SCHEMA.empty_table()], list[str](), list[float]()
        for batch in self.decode.batches(item):
            lost, whites = lost + batch.lost, whites + batch.whites
            if len(batch.x):
                codes = [row.tobytes() for row in self.encoder(batch.x)]
                ids = _with_domain(batch.ids, item["split"])
                tables.append(pa.table({"id": ids, "label": np.array(batch.labels, np.int32), "code": codes, "origin": batch.origins}, schema=SCHEMA))
        table = pa.concat_tables(tables).replace_schema_metadata(self.meta)
        with atomic_write(self.staging / f"part-{item['part']:05d}.parquet") as file:
            pq.write_table(table, file)
        return {"part": item["part"], "codes": len(table), "lost": json.dumps(lost), "whites": json.dumps(whites)}


def _with_domain(ids: list[str], split: str) -> list[str]:
    """Ids that begin with the domain of ``split``, DOMAIN/SPLIT: those of domains that were ingested one by one may be the same. "" leaves them as they are."""
    domain = f"{split_name(split)[0]}/" if split else ""
    return [each if each.startswith(domain) else f"{domain}{each}" for each in ids]


def _size(rows: int, workers: int, shape: tuple[int, ...]) -> int:
    """Rows of a part: small enough for several parts per encoder and for a decoded part in memory, in whole batches."""
    batch = batch_rows(shape)
    return batch * max(1, min(PART // int(np.prod(shape)) // batch, -(-rows // (4 * max(1, workers) * batch))))


def _dataset(path: Path) -> Manifest | None:
    """The manifest of a dataset; None if the path is of image files."""
    return Manifest.read(path) if (path / "manifest.json").exists() else None


def _dataset_items(config: Config, manifest: Manifest, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    if tuple(manifest.shape) != tuple(shape):
        raise ValueError(f"{config.model} takes rows of shape {list(shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if config.domain and config.domain not in manifest.domains:
        raise ValueError(f"dataset {manifest.dataset!r} has no domain {config.domain!r}: it has {', '.join(manifest.domains)}")
    domains = [config.domain] if config.domain else list(manifest.domains)
    counts = {f"{d}/{s}": manifest.split(d, s).rows for d in domains for s in ([config.split] if config.split else manifest.domains[d].splits)}
    size = _size(sum(counts.values()), config.workers, shape)
    return [
        {"split": name, "start": start, "stop": min(start + size, rows), "files": ""} for name, rows in counts.items() for start in range(0, rows, size)
    ]


def _file_items(path: Path, workers: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    names = [path.name] if path.is_file() else [str(each.relative_to(path)) for each in image_files(path)]
    if not names:
        raise ValueError(f"{path} contains no image file ({', '.join(sorted(SUFFIXES))}) and is not a dataset")
    size = _size(len(names), workers, shape)
    return [{"split": "", "start": 0, "stop": 0, "files": json.dumps(names[start : start + size])} for start in range(0, len(names), size)]


def run(config: Config) -> dict[str, Any]:
    """Encode; returns the number of codes and the images left out."""
    path, out = to_path(config.input), to_path(config.out)
    if not path.exists():
        raise ValueError(f"no file or folder {config.input!r} to encode")
    if out.exists():
        raise ValueError(f"{out} exists already: give another --out, or remove it")
    rows = _dataset(path)
    model = resolve(found_by_workers(config.model, config.storage), config.storage, config.tracking).name  # codes keep the version, an alias moves
    config = dataclasses.replace(config, model=model)
    encoder = open_encoder(config.model, config.storage, config.tracking, rows=rows)
    if not rows and len(encoder.shape) != 3:
        raise ValueError(f"{config.model} takes feature vectors, {path} holds files: ingest the features and give the dataset")
    if rows and config.range:
        raise ValueError(NO_RANGE)
    items = _dataset_items(config, rows, encoder.shape) if rows else _file_items(path, config.workers, encoder.shape)
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    absolute = dataclasses.replace(  # workers may have another working folder and environment
        config, input=str(path.resolve()), storage=str(to_path(config.storage).resolve()), tracking=registry_uri(config.model, config.storage, config.tracking)
    )
    try:
        told = _encode_all([item | {"part": part} for part, item in enumerate(items)], staging, absolute, encoder)
        count, lost = sum(item["codes"] for item in told), [line for item in told for line in json.loads(item["lost"])]
        one_white(Counter(white for item in told for white in json.loads(item["whites"])), config.input)
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
    if not config.workers and not config.gpu and rows <= FEW:
        return list(map(_Encode(config, str(staging.resolve()), encoder), items))
    given = {"config": config, "staging": str(staging.resolve()), "threads": 1}
    return on_ray(items, _Encode, given, config.workers, Decode(config.input, encoder.shape, 1, value_range(config.range)) if config.gpu else None)
