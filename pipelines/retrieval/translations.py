"""Draws translations: source images beside what a method makes of them in the target's style."""

from pathlib import Path

import numpy as np
import torch

from data.decoding import read_decoded
from data.manifest import Manifest
from models.method import Method
from pipelines.retrieval.plots import pairs_grid

PER_CLASS, MOST = 8, 200  # pairs of a grid: per class, and in total


def translate_all(method: Method, x: np.ndarray, batch: int = 256) -> np.ndarray:
    """Translate source images into the target domain; both (n, channels, h, w) uint8."""
    with torch.no_grad():
        return torch.cat([method.translate(part.to(method.device)).cpu() for part in torch.from_numpy(x).split(batch)]).numpy()


def draw(x: np.ndarray, made: np.ndarray, labels: np.ndarray, title: str, path: Path) -> None:
    """Draw source images beside their translations: one row per class, in class order, if labels are known."""
    known = np.unique(labels[labels >= 0])
    rows = [np.flatnonzero(labels == label)[:PER_CLASS] for label in known[: MOST // PER_CLASS]]
    if not len(known):
        rows = [part for part in np.split(np.arange(len(x))[:MOST], range(PER_CLASS, min(len(x), MOST), PER_CLASS)) if len(part)]
    pairs_grid([[(x[i], made[i]) for i in row] for row in rows], title, path)


class Sampler:
    """Draws the same source images beside their translations after each epoch."""

    def __init__(self, method: Method, root: Path, manifest: Manifest, source: str, folder: Path) -> None:
        """Args:
            source: the domain to draw from: the first images of each class, of the test split if there is one.
            folder: where the pictures go.
        """
        self.method, self.folder, self.source = method, folder, source
        split = "test" if "test" in manifest.domains[source].splits else "train"
        found: dict[int, list[np.ndarray]] = {}
        for part in read_decoded(root, manifest, source, split, 0, min(2000, manifest.split(source, split).rows)):
            for image, label in zip(part.x.numpy(), part.labels.tolist(), strict=True):
                if len(found.setdefault(label, [])) < PER_CLASS:
                    found[label].append(image.copy())  # not a view of its whole batch
        kept = sorted(found)[: MOST // PER_CLASS]
        self.x, self.labels = np.stack([image for label in kept for image in found[label]]), np.repeat(kept, [len(found[label]) for label in kept])

    def __call__(self, epoch: int) -> Path:
        """Draw the picture of an epoch; returns its path."""
        path = self.folder / f"translations-{epoch:05d}.png"
        draw(self.x, translate_all(self.method, self.x), self.labels, f"{self.source} and its translations after epoch {epoch}", path)
        return path
