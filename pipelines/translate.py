"""Command: translate source images into the target's style, with a method that generates images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.filesystem import atomic_write, to_path
from models.method import Method
from pipelines.console.config import RANGE, option, positional, required, value_range
from pipelines.retrieval.plots import picture
from pipelines.retrieval.queries import load_queries
from pipelines.retrieval.translations import draw, translate_all
from pipelines.training import checkpoint, runs
from pipelines.training.restore import load_method


@dataclass
class Config:
    """Options of ``hashbridge translate``."""

    run: str = positional("id of a run of a method that generates images")
    images: str = positional("an image, a folder of images, or DATASET#DOMAIN/SPLIT#FIRST-LAST")
    out: str = required("folder for the translated images and grid.png")
    range: str = option("", RANGE)
    storage: str = option("runs", "folder of runs")

    def __post_init__(self) -> None:
        value_range(self.range)


def load_generator(folder: Path) -> tuple[Method, tuple[int, ...]]:
    """Load the method of a run and the shape of its images.

    Raises:
        ValueError: the method does not generate images.
    """
    method = load_method(folder)
    if not method.can_translate:
        raise ValueError(f"run {folder.name} of {method.name} has no generator of images: train igan, sigan or dtn on images with its generating terms")
    if len(method.shape) != 3:
        raise ValueError(f"run {folder.name} makes feature vectors, not images")
    return method, method.shape


def run(config: Config) -> dict[str, Any]:
    """Translate images; returns the files written."""
    folder = runs.find_run(config.run, config.storage)
    method, shape = load_generator(folder)
    names, x, labels, _ = load_queries(config.images, shape, value_range(config.range))
    made = translate_all(method, x)
    out = to_path(config.out)
    files = []
    for i, (name, image) in enumerate(zip(names, made, strict=True)):
        files.append(out / f"{i:05d}-{Path(name).stem.rpartition('#')[2][:60]}.png")
        with atomic_write(files[-1]) as file:
            Image.fromarray(image[0] if len(image) == 1 else picture(image)).save(file)
    draw(x, made, np.array(labels), f"{len(x)} images and their translations by {folder.name}", out / "grid.png")
    epoch = checkpoint.read_state(checkpoint.latest(folder / "checkpoints") or folder)["epoch"]
    print(f"{len(files)} images translated by {folder.name} (epoch {epoch}) in {out}; {out / 'grid.png'} shows each beside its original")
    return {"run_id": folder.name, "images": [str(each) for each in files], "grid": str(out / "grid.png")}
