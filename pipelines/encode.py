"""Command: encode a folder of images or a dataset to Parquet files of codes, with Ray Data if there are many."""


import dataclasses
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.decoding import batch_rows, decode_files, read_decoded, split_name
from data.filesystem import atomic_write, move, remove, to_path
from data.images import SUFFIXES
from data.manifest import Manifest
from data.readers.base import printable
from data.readers.folder import image_files
from models.allocator import keep_freed_memory
from pipelines.console import cluster
from pipelines.console.config import option, positional, required
from pipelines.registry.encoders import Encoder, open_encoder, registry_uri
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
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")
    workers: int = option(0, "encoders at a time, by Ray Data (default: one; this process alone for few rows)")
    gpu: bool = option(False, "encode on the GPUs of the Ray cluster, one per encoder; other tasks decode the images")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}, but must not be negative")


class _Batch(NamedTuple):
    """Decoded rows (n, ...) with their ids, labels and origins, and the images that could not be read."""

    x: np.ndarray
    ids: list[str]
    labels: list[int]
    origins: list[str]
    lost: list[str]


class _Decode:
    """Decodes one part after another, in the encoder's own process, or in tasks of its own, so that CPU nodes feed GPU nodes.
    """

    def __init__(self, path: str, shape: tuple[int, ...], threads: int | None = None) -> None:
        self.root, self.shape, self.threads = to_path(path), shape, threads

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """A part with all its rows as plain values, for ``_Encode`` in another process."""
        batches = list(self.batches(item))
        lost = [line for batch in batches for line in batch.lost]
        whole = [np.ascontiguousarray(batch.x) for batch in batches if len(batch.x)]
        columns = {name: [value for batch in batches for value in getattr(batch, name)] for name in ("ids", "labels", "origins")}
        return {"part": item["part"], "lost": json.dumps(lost), "rows": json.dumps(columns), "x": b"".join(x.tobytes() for x in whole)}

    def batches(self, item: dict[str, Any]) -> Iterator[_Batch]:
        """The rows of a part in batches of the size that an encoder takes at once."""
        return self._rows(item["split"], item["start"], item["stop"]) if item["split"] else self._files(json.loads(item["files"]))

    def _rows(self, name: str, start: int, stop: int) -> Iterator[_Batch]:
        manifest, origin = Manifest.read(self.root), f"{self.root.resolve()}#{name}"
        for part in read_decoded(self.root, manifest, *split_name(name), start, stop, ids=True, threads=self.threads):
            assert part.id is not None
            yield _Batch(part.x.numpy(), part.id, part.labels.tolist(), [f"{origin}#{row}" for row in part.row], [])

    def _files(self, names: list[str]) -> Iterator[_Batch]:
        paths = [self.root / name if self.root.is_dir() else self.root for name in names]
        decoded, size = zip(names, paths, decode_files(paths, self.shape, self.threads), strict=True), batch_rows(self.shape)
        while block := list(islice(decoded, size)):
            read = [(name, path, image) for name, path, image in block if isinstance(image, np.ndarray)]
            lost = [f"{printable(name)}: {image}" for name, _, image in block if not isinstance(image, np.ndarray)]
            x = np.stack([image for _, _, image in read]) if read else np.empty((0, *self.shape), np.uint8)
            yield _Batch(x, [printable(name) for name, _, _ in read], [-1] * len(read), [printable(str(path.resolve())) for _, path, _ in read], lost)


class _Encode:
    """Encodes one part after another and writes the codes of each to its own file.

    A part's file is named by its number and written atomically. When Ray encodes a part again after a node failed, it writes the
    same file again, so each row appears exactly once.
    """

    def __init__(self, config: Config, staging: str, encoder: Encoder | None = None, threads: int | None = None) -> None:
        keep_freed_memory()
        self.encoder = encoder or open_encoder(config.model, config.storage, config.tracking, config.gpu)
        self.decode, self.staging = _Decode(config.input, self.encoder.shape, threads), to_path(staging)
        self.meta = {b"bits": str(self.encoder.bits).encode(), b"model": config.model.encode()}
        if (self.decode.root / "manifest.json").exists():
            self.meta[b"classes"] = json.dumps(Manifest.read(self.decode.root).classes).encode()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode a part: one that ``_Decode`` has decoded, or one that is decoded here."""
        tables, lost = [SCHEMA.empty_table()], []
        for batch in self._decoded(item) if "x" in item else self.decode.batches(item):
            lost += batch.lost
            if len(batch.x):
                codes = [row.tobytes() for row in self.encoder(batch.x)]
                tables.append(pa.table({"id": batch.ids, "label": np.array(batch.labels, np.int32), "code": codes, "origin": batch.origins}, schema=SCHEMA))
        table = pa.concat_tables(tables).replace_schema_metadata(self.meta)
        with atomic_write(self.staging / f"part-{item['part']:05d}.parquet") as file:
            pq.write_table(table, file)
        return {"part": item["part"], "codes": len(table), "lost": json.dumps(lost)}

    def _decoded(self, item: dict[str, Any]) -> Iterator[_Batch]:
        rows, shape = json.loads(item["rows"]), self.encoder.shape
        kind = np.uint8 if len(shape) == 3 else np.float32
        x, size = np.frombuffer(item["x"], kind).reshape(-1, *shape), batch_rows(shape)
        yield _Batch(x[:0], [], [], [], json.loads(item["lost"]))
        for part in (slice(start, start + size) for start in range(0, len(x), size)):
            yield _Batch(x[part].copy(), rows["ids"][part], rows["labels"][part], rows["origins"][part], [])


def _size(rows: int, workers: int, shape: tuple[int, ...]) -> int:
    """Rows of a part: small enough for several parts per encoder and for a decoded part in memory, in whole batches."""
    batch = batch_rows(shape)
    return batch * max(1, min(PART // int(np.prod(shape)) // batch, -(-rows // (4 * max(1, workers) * batch))))


def _dataset_items(config: Config, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    manifest = Manifest.read(to_path(config.input))
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
    encoder = open_encoder(config.model, config.storage, config.tracking)
    dataset = (path / "manifest.json").exists()
    if not dataset and len(encoder.shape) != 3:
        raise ValueError(f"{config.model} takes feature vectors, {path} holds files: ingest the features and give the dataset")
    items = _dataset_items(config, encoder.shape) if dataset else _file_items(path, config.workers, encoder.shape)
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
    if not config.workers and not config.gpu and rows <= FEW:
        return list(map(_Encode(config, str(staging.resolve()), encoder), items))
    ray = cluster.connect()
    if config.gpu and ray.cluster_resources().get("GPU", 0) < max(1, config.workers):
        raise ValueError(f"--gpu needs {max(1, config.workers)} GPUs, but the cluster has {ray.cluster_resources().get('GPU', 0):g}: fewer --workers")
    return encode_on_ray(items, staging, config, encoder.shape, apart=config.gpu, resources={"num_gpus": 1} if config.gpu else {"num_cpus": 1})


def encode_on_ray(
    items: list[dict[str, Any]], staging: Path, config: Config, shape: tuple[int, ...], apart: bool, resources: dict[str, float]
) -> list[dict[str, Any]]:  # fmt: skip
    """Encode all parts by a pool of actors, which hold the encoder.

    Args:
        apart: whether tasks of their own decode the parts; otherwise the actors do.
        resources: of an actor.
    """
    import ray.data  # noqa: PLC0415

    parts: Any = ray.data.from_items(items, override_num_blocks=len(items))
    if apart:
        parts = parts.map(_Decode(config.input, shape, 1).__call__)
    pool = ray.data.ActorPoolStrategy(size=max(1, config.workers))
    given = {"config": config, "staging": str(staging.resolve()), "threads": 1}
    told: list[dict[str, Any]] = parts.map(_Encode, fn_constructor_kwargs=given, compute=pool, **resources).take_all()
    return told


def _part(item: dict[str, Any]) -> int:
    return item["part"]
