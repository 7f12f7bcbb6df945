"""Command: features of a dataset's images by a pretrained backbone, as a dataset of features.

Each part of the images becomes one shard in a folder beside the new dataset. A run that was cut off goes on where it was: shards that
are there are kept. The finished folder is renamed.
"""

import hashlib
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from data.decoding import batch_rows
from data.filesystem import atomic_write, list_files, move, to_path, write_text
from data.layout import Layout
from data.locks import is_leased, lease
from data.manifest import Domain, Embedding, Manifest, Split
from data.transforms import VIEWS, random_view, seeded_generator
from models.allocator import keep_freed_memory
from models.encoder import encode_all
from models.networks.pretrained import BUNDLED, PretrainedBackbone, open_backbone
from pipelines.console import cluster
from pipelines.console.config import option, positional, required
from pipelines.parts import Decode, on_ray
from pipelines.training.restore import BACKBONE_FILE, dataset_backbone, device_for

BATCHES = 16  # batches of a part, whatever the number of workers: parts that are there are kept when it changes
BEGUN = "embedding.json"  # in an unfinished folder: what is being made


@dataclass
class Config:
    """Options of ``hashbridge embed``."""

    dataset: str = positional("folder of a dataset of images")
    out: str = required("folder of the dataset of features, which must not exist yet")
    backbone: str = option(BUNDLED, f"{BUNDLED}, whose weights are installed; timm:NAME or torchvision:NAME")
    weights: str = option("default", "default: those of the name, from the hub; a file (.safetensors, .pth); a folder of the hub's cache; or none")
    size: int = option(0, "side of the backbone's input in pixels (default: its own)")
    pool: str = option("", "timm: pooling of the last features, such as avg or token (default: the backbone's own)")
    views: int = option(0, "random views of each image that are embedded too, for the views that methods train on")
    kind: str = option("crop", "kind of the views", tuple(VIEWS))
    workers: int = option(0, "backbones at a time, by Ray Data (default: this process alone)")
    gpu: bool = option(False, "embed on the GPUs of the Ray cluster, one per worker; other tasks decode the images")

    def __post_init__(self) -> None:
        for name in ("workers", "size", "views"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must not be negative")
        if not self.out.strip(" ./"):
            raise ValueError(f"--out is {self.out!r}, but must name a folder")


class _Embed:
    """Embeds one part after another; each becomes a shard, written atomically and always the same.

    All workers take the backbone's weights from the unfinished folder, so they have the same, and no worker needs the hub.
    """

    def __init__(self, embedding: Embedding, staging: str, gpu: bool = False, backbone: PretrainedBackbone | None = None, threads: int | None = None) -> None:
        keep_freed_memory()
        manifest, self.staging = Manifest.read(to_path(embedding.images)), to_path(staging)
        self.backbone = (backbone or dataset_backbone(self.staging, embedding)).to(device_for(gpu))
        self.decode = Decode(embedding.images, tuple(manifest.shape), threads)
        self.seed, self.views, self.kind = manifest.seed, embedding.views, embedding.kind
        self.schema = Layout("feature", (self.backbone.features,), manifest.seed, views=self.views).schema()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Embed a part and write its shard."""
        found, ids, labels = list[np.ndarray](), list[str](), list[int]()
        for batch in self.decode.batches(item):
            if len(batch.x):
                found.append(self._embedded(torch.from_numpy(np.ascontiguousarray(batch.x)), crc32(item["split"].encode()), item["start"] + len(ids)))
            ids += batch.ids
            labels += batch.labels
        features, width = np.concatenate(found), self.backbone.features
        if not np.isfinite(features).all():
            raise ValueError(f"{int((~np.isfinite(features).all(1)).sum())} of {len(features)} images of {item['split']} have features that are not finite")
        rows = pa.array(range(item["start"], item["stop"]), pa.int64())
        parts = [features[:, :width], features[:, width:]] if self.views else [features]
        columns = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1]) for part in parts]
        table = pa.Table.from_arrays([pa.array(ids), rows, *columns, pa.array(labels, pa.int32())], schema=self.schema)
        with atomic_write(self.staging / item["path"]) as file:
            pq.write_table(table, file, row_group_size=2048)
        return {"part": item["part"]}

    def _embedded(self, x: torch.Tensor, split: int, row: int) -> np.ndarray:
        """Features of images and then of their views, (n, (1 + views) * width); the views are a function of seed, split and the number of the first row."""
        views = [random_view(x, seeded_generator(self.seed, split, row, number), kind=self.kind) for number in range(self.views)]
        return np.concatenate([encode_all(self.backbone, each).numpy() for each in (x, *views)], 1)


def _items(manifest: Manifest) -> list[dict[str, Any]]:
    """The parts of a dataset, with the paths of their shards."""
    size, items = BATCHES * batch_rows(tuple(manifest.shape)), list[dict[str, Any]]()
    for domain, of in manifest.domains.items():
        for split, given in of.splits.items():
            for number, start in enumerate(range(0, given.rows, size)):
                path = f"domain={domain}/split={split}/part-{number:05d}.parquet"
                items.append({"part": len(items), "split": f"{domain}/{split}", "start": start, "stop": min(start + size, given.rows), "path": path})
    return items


def run(config: Config) -> dict[str, Any]:
    """Embed; returns the rows of each split."""
    root, out = to_path(config.dataset), to_path(config.out)
    manifest = Manifest.read(root)
    if manifest.store == "feature":
        raise ValueError(f"dataset {manifest.dataset!r} holds features, not images")
    if out.exists():
        raise ValueError(f"{out} exists already: give another --out, or remove it")
    backbone = open_backbone(config.backbone, config.weights, config.size, config.pool)
    embedding = Embedding(
        config.backbone, backbone.digest(), backbone.size, config.pool, backbone.preprocessing, config.views, config.kind if config.views else "",
        str(root.resolve()), manifest.digest(), manifest.shape,
    )
    staging, items = out.with_name(f".{out.name}.embedding"), _items(manifest)
    with ExitStack() as stack:
        left = _begin(staging, embedding, backbone, items, stack)
        print(f"{len(items) - len(left):,} of {len(items):,} parts are there; {backbone.name}, {backbone.features} features", file=sys.stderr, flush=True)
        try:
            if left and (config.workers or config.gpu):
                given = {"embedding": embedding, "staging": str(staging.resolve()), "gpu": config.gpu, "threads": 1}
                decode = Decode(embedding.images, tuple(manifest.shape), 1) if config.gpu else None
                on_ray(left, _Embed, given, config.workers, decode)
            elif left:
                work = _Embed(embedding, str(staging), backbone=backbone)
                for item in left:
                    work(item)
        except Exception as error:
            raise cluster.user_error(error) from error
        made = _finish(staging, out, manifest, embedding, backbone.features, items)
    rows = {f"{domain}/{split}": part.rows for domain, of in made.domains.items() for split, part in of.splits.items()}
    print(f"{sum(rows.values()):,} images as {backbone.features} features by {backbone.name} in {out}")
    return {"out": str(out), "rows": rows, "features": backbone.features, "backbone": backbone.name, "weights": embedding.weights, "digest": made.digest()}


def _begin(staging: Path, embedding: Embedding, backbone: PretrainedBackbone, items: list[dict[str, Any]], stack: ExitStack) -> list[dict[str, Any]]:
    """Open the unfinished folder, a new one or that of a run that was cut off, with the backbone's weights; returns the parts that are not there yet.

    Raises:
        ValueError: another run works on it, or it is of other images or another backbone.
    """
    staging.mkdir(parents=True, exist_ok=True)
    held = staging.with_name(f"{staging.name}.lease")
    if is_leased(held):
        raise ValueError(f"another embed is writing {staging}: wait for it, or give another --out")
    stack.enter_context(lease(held))
    begun, wanted = staging / BEGUN, json.dumps(asdict(embedding) | {"parts": len(items)})
    if begun.exists() and begun.read_text() != wanted:
        raise ValueError(f"{staging} is an unfinished embedding of other images or by another backbone: remove it, or give another --out")
    if not begun.exists():
        with atomic_write(staging / BACKBONE_FILE) as file:
            save_file({key: tensor.cpu().contiguous() for key, tensor in backbone.network.state_dict().items()}, file)
        write_text(begun, wanted)
    return [item for item in items if not (staging / item["path"]).exists()]


def _finish(staging: Path, out: Path, images: Manifest, embedding: Embedding, features: int, items: list[dict[str, Any]]) -> Manifest:
    """Write the manifest and rename the folder."""
    made = Manifest(out.name, images.classes, "feature", [features], images.seed, embedding=embedding)
    for name, of in images.domains.items():
        splits = {split: Split(part.rows, part.labels, part.unlabelled, []) for split, part in of.splits.items()}
        made.domains[name] = Domain(of.origin, splits, of.rejected, of.notes)
    for item in items:
        domain, split = item["split"].rsplit("/", 1)
        digest = hashlib.sha256((staging / item["path"]).read_bytes()).hexdigest()
        made.domains[domain].splits[split].files.append({"path": item["path"], "rows": item["stop"] - item["start"], "sha256": digest})
    made.write(staging)
    for file in list_files(staging):
        if file.name == BEGUN or file.name.startswith("."):  # or of a worker that was killed while it wrote
            file.unlink()
    move(staging, out)
    return made
