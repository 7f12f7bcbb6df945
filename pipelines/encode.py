"""Stage: a folder, a dataset or Parquet files to a Parquet of codes, in bulk on Ray Data.

Columns: ``id`` string, ``label`` int32 (-1 where unknown), ``code`` binary of bits / 8 bytes, ``origin`` string (the
image's file, or DATASET#DOMAIN/SPLIT#ROW).
"""

import functools
import hashlib
import shutil
import uuid
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.images import SUFFIXES, decode
from data.manifest import Manifest
from data.shards import read_rows, to_arrays
from pipelines import cluster
from pipelines.config import option, positional, required
from pipelines.models_io import Encoder, open_encoder

BATCH = 512
SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int32()), ("code", pa.binary()), ("origin", pa.string())])


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
    workers: int = option(1, "encoders at a time")


class _Encode:
    """An encoder; takes work items (a range of a split's rows, or image files) and gives their codes."""

    def __init__(self, config: Config) -> None:
        self.encoder: Encoder = open_encoder(config.model, config.storage, config.tracking)
        self.root = Path(config.input)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        tables = [
            self._rows(str(split), int(start), int(stop)) if split else self._files(str(files))
            for split, start, stop, files in zip(batch["split"], batch["start"], batch["stop"], batch["files"], strict=True)
        ]
        return pa.concat_tables(tables)

    def _rows(self, name: str, start: int, stop: int) -> pa.Table:
        manifest = Manifest.read(self.root)
        domain, split = name.rsplit("/", 1)
        batches = list(read_rows(self.root, manifest, domain, split, start, stop, ids=True))
        ids = [each for batch in batches for each in batch.column("id").to_pylist()]
        labels = np.concatenate([batch.column("label").to_numpy() for batch in batches])
        x = np.concatenate([to_arrays(batch, manifest) for batch in batches])
        origins = [f"{self.root.resolve()}#{name}#{row}" for row in range(start, stop)]
        return self._table(ids, labels, x, origins)

    def _files(self, files: str) -> pa.Table:
        ids: list[str] = []
        images: list[np.ndarray] = []
        origins: list[str] = []
        lost: list[str] = []
        for name in files.split("\n"):
            path = self.root / name if self.root.is_dir() else self.root
            try:
                images.append(decode(path.read_bytes(), self.encoder.shape[0], self.encoder.shape[1]))
            except (ValueError, OSError) as error:
                lost.append(f"{name}: {error}")
                continue
            ids.append(name)
            origins.append(str(path.resolve()))
        x = np.stack(images) if images else np.zeros((0, *self.encoder.shape), np.uint8)
        table = self._table(ids, np.full(len(ids), -1), x, origins)
        empty = {"id": [""] * len(lost), "label": [-1] * len(lost), "code": [b""] * len(lost), "origin": lost}
        return pa.concat_tables([table, pa.table(empty, schema=SCHEMA)])

    def _table(self, ids: list[Any], labels: np.ndarray, x: np.ndarray, origins: list[str]) -> pa.Table:
        codes = self.encoder(x) if len(x) else np.zeros((0, self.encoder.bits // 8), np.uint8)
        return pa.table({"id": ids, "label": labels.astype(np.int32), "code": [row.tobytes() for row in codes], "origin": origins}, schema=SCHEMA)


@functools.lru_cache(maxsize=1)
def _loaded(call: str, *options: Any) -> _Encode:
    """The encoder of a config, given as its values: loaded once a call of the stage by each of Ray's worker processes.

    Worker processes outlive a call, and an alias may have moved before the next: hence ``call``, another each time.
    """
    return _Encode(Config(*options))


def _encode(batch: dict[str, np.ndarray], call: str, config: Config) -> pa.Table:
    return _loaded(call, *astuple(config))(batch)


def _dataset_items(config: Config, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    manifest = Manifest.read(Path(config.input))
    if tuple(manifest.shape) != tuple(shape):
        raise ValueError(f"{config.model} takes rows of shape {list(shape)}, dataset {manifest.dataset!r} has {manifest.shape}")
    if config.domain and config.domain not in manifest.domains:
        raise ValueError(f"dataset {manifest.dataset!r} has no domain {config.domain!r}: it has {', '.join(manifest.domains)}")
    domains = [config.domain] if config.domain else list(manifest.domains)
    names = [(d, s) for d in domains for s in ([config.split] if config.split else manifest.domains[d].splits)]
    return [
        {"split": f"{d}/{s}", "start": start, "stop": min(start + BATCH, manifest.split(d, s).rows), "files": ""}
        for d, s in names
        for start in range(0, manifest.split(d, s).rows, BATCH)
    ]


def _file_items(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        names = [path.name]
    else:
        names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
    if not names:
        raise ValueError(f"{path} holds no image file ({', '.join(sorted(SUFFIXES))}) and is no dataset")
    batches = ["\n".join(names[start : start + BATCH]) for start in range(0, len(names), BATCH)]
    return [{"split": "", "start": 0, "stop": 0, "files": each} for each in batches]


def run(config: Config) -> dict[str, Any]:
    """Encode; returns the number of codes, of images left out, and the codes' digest."""
    path, out = Path(config.input), Path(config.out)
    if not path.exists():
        raise ValueError(f"no file or folder {config.input!r} to encode")
    if out.exists():
        raise ValueError(f"{out} exists already: give another --out, or remove it")
    encoder = open_encoder(config.model, config.storage, config.tracking)
    dataset = (path / "manifest.json").exists()
    if not dataset and len(encoder.shape) != 3:
        raise ValueError(f"{config.model} takes feature vectors, {path} holds files: ingest the features and give the dataset")
    items = _dataset_items(config, encoder.shape) if dataset else _file_items(path)
    cluster.start()
    import ray.data  # noqa: PLC0415

    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        written, lost = _write(ray.data.from_items(items, override_num_blocks=len(items)), config, staging, encoder.bits)
        staging.rename(out)
    except Exception as error:
        raise cluster.user_error(error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for line in lost[:5]:
        print(f"  left out {line}")
    print(f"{written:,} codes of {encoder.bits} bits in {out}; {len(lost)} images left out")
    return {"out": str(out), "codes": written, "bits": encoder.bits, "rejected": lost}


def _write(items: Any, config: Config, staging: Path, bits: int) -> tuple[int, list[str]]:
    """Stream the codes to Parquet files in the items' order; their number and the images left out."""
    import ray  # noqa: PLC0415

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    coded = items.map_batches(_encode, fn_args=(uuid.uuid4().hex, config), batch_size=1, concurrency=config.workers)
    written, lost, part, waiting = 0, [], 0, []
    meta = {b"bits": str(bits).encode(), b"model": config.model.encode()}
    for batch in coded.iter_batches(batch_size=None, batch_format="pyarrow"):
        codes = pc.binary_length(batch["code"])
        lost += batch.filter(pc.equal(codes, 0))["origin"].to_pylist()
        waiting.append(batch.filter(pc.greater(codes, 0)))
        if sum(map(len, waiting)) >= 65536:
            written, part, waiting = _flush(waiting, staging, part, written, meta), part + 1, []
    if waiting:
        written = _flush(waiting, staging, part, written, meta)
    if not written:
        raise ValueError(f"not one image can be read; the first: {lost[0]}")
    return written, lost


def _flush(waiting: list[pa.Table], staging: Path, part: int, written: int, meta: dict[bytes, bytes]) -> int:
    table = pa.concat_tables(waiting).cast(SCHEMA).replace_schema_metadata(meta)
    pq.write_table(table, staging / f"part-{part:05d}.parquet")
    return written + len(table)


def read_codes(folder: Path) -> tuple[pa.Table, np.ndarray, dict[str, str]]:
    """A folder of codes: its table, the packed codes (n, bits / 8) uint8, and ``bits`` and ``model``.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    if not folder.is_dir() or not list(folder.glob("*.parquet")):
        raise ValueError(f"no codes at {folder}: give the folder that `hashbridge encode --out` wrote")
    try:
        table = pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("*.parquet"))])
        meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        codes = np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8).reshape(len(table), -1)
        return table, codes, {"bits": str(codes.shape[1] * 8), "model": meta["model"]}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"codes at {folder} cannot be read ({str(error).splitlines()[0]}): encode again") from error


def digest(codes: np.ndarray) -> str:
    """SHA-256 of packed codes; 16 hex digits."""
    return hashlib.sha256(codes.tobytes()).hexdigest()[:16]
