"""Stage: source images in the target's style, by the methods that generate images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.manifest import Manifest
from data.places import path_of, written
from data.shards import read_rows, to_arrays
from models.method import Method
from pipelines import checkpoint, evaluate, runs
from pipelines.config import option, positional, required
from pipelines.search import load_queries

PER_CLASS, MOST = 8, 200  # pairs of a grid: of each class, and in all


@dataclass
class Config:
    """Options of ``hashbridge translate``."""

    run: str = positional("id of a run of a method that generates images")
    images: str = positional("an image, a folder of images, or DATASET#DOMAIN/SPLIT#FIRST-LAST")
    out: str = required("folder for the translated images and grid.png")
    storage: str = option("runs", "folder of runs")


def translate_all(method: Method, x: np.ndarray, batch: int = 256) -> np.ndarray:
    """Images of the target domain made of source images, both (n, channels, h, w) uint8."""
    device = next(method.kept().parameters()).device
    with torch.no_grad():
        return torch.cat([method.translate(part.to(device)).cpu() for part in torch.from_numpy(x).split(batch)]).numpy()


def draw(x: np.ndarray, made: np.ndarray, labels: np.ndarray, title: str, path: Path) -> None:
    """A grid of source images, each beside its translation: a row for each class, in class order, where labels are known."""
    from pipelines.plots import pairs_grid  # noqa: PLC0415  matplotlib is slow to import

    known = np.unique(labels[labels >= 0])
    rows = [np.flatnonzero(labels == label)[:PER_CLASS] for label in known[: MOST // PER_CLASS]]
    if not len(known):
        rows = [part for part in np.split(np.arange(len(x))[:MOST], range(PER_CLASS, min(len(x), MOST), PER_CLASS)) if len(part)]
    pairs_grid([[(x[i], made[i]) for i in row] for row in rows], title, path)


class Sampler:
    """Draws, after an epoch, the same source images beside what they are translated into then."""

    def __init__(self, method: Method, root: Path, manifest: Manifest, source: str, folder: Path) -> None:
        """Args:
        source: the domain whose first images of each class, of the test split where there is one, are drawn.
        folder: where the pictures go.
        """
        self.method, self.folder, self.source = method, folder, source
        split = "test" if "test" in manifest.domains[source].splits else "train"
        batches = list(read_rows(root, manifest, source, split, 0, min(2000, manifest.split(source, split).rows)))
        x = np.concatenate([to_arrays(batch, manifest) for batch in batches])
        labels = np.concatenate([batch.column("label").to_numpy() for batch in batches]).astype(np.int64)
        chosen = np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in np.unique(labels)[: MOST // PER_CLASS]])
        self.x, self.labels = x[chosen], labels[chosen]

    def __call__(self, epoch: int) -> Path:
        """The picture's path."""
        path = self.folder / f"translations-{epoch:05d}.png"
        draw(self.x, translate_all(self.method, self.x), self.labels, f"{self.source} and its translations after epoch {epoch}", path)
        return path


def load_generator(folder: Path) -> tuple[Method, tuple[int, ...]]:
    """The method of a run that makes images, and its images' shape.

    Raises:
        ValueError: it makes none.
    """
    method = evaluate.load_method(folder)
    if not method.generates:
        raise ValueError(f"run {folder.name} of {method.name} has no generator: train igan, sigan or dtn with its generating terms on")
    if len(method.shape) != 3:
        raise ValueError(f"run {folder.name} makes feature vectors, not images")
    return method, method.shape


def run(config: Config) -> dict[str, Any]:
    """Translate images; returns the files written."""
    folder = runs.find_run(config.run, config.storage)
    method, shape = load_generator(folder)
    names, x, labels = load_queries(config.images, shape)
    made = translate_all(method, x)
    out = path_of(config.out)
    from PIL import Image  # noqa: PLC0415

    from pipelines.plots import picture  # noqa: PLC0415

    files = []
    for i, (name, image) in enumerate(zip(names, made, strict=True)):
        files.append(out / f"{i:05d}-{Path(name).stem.rpartition('#')[2][:60]}.png")
        with written(files[-1]) as file:
            Image.fromarray(image[0] if len(image) == 1 else picture(image)).save(file)
    draw(x, made, np.array(labels), f"{len(x)} images and their translations by {folder.name}", out / "grid.png")
    epoch = checkpoint.read_state(checkpoint.latest(folder / "checkpoints") or folder)["epoch"]
    print(f"{len(files)} images translated by {folder.name} (epoch {epoch}) in {out}; {out / 'grid.png'} shows each beside its original")
    return {"run_id": folder.name, "images": [str(each) for each in files], "grid": str(out / "grid.png")}
