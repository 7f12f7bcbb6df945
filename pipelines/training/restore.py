"""Restores the trained method of a run from its last checkpoint, and the backbone that embedded its images."""

from pathlib import Path
from typing import Any, cast

import torch

from data.filesystem import local_copy, to_path
from data.manifest import Embedding, Manifest
from models.encoder import OnImages
from models.method import Method
from models.networks.pretrained import PretrainedBackbone, open_backbone
from models.registry import find_method
from pipelines.console.config import build
from pipelines.training import checkpoint, runs

CPU = torch.device("cpu")
BACKBONE_FILE = "backbone.safetensors"  # in a dataset of features: the weights of what embedded its images


def device_for(gpu: bool) -> torch.device:
    """The first GPU if one is asked for, otherwise the CPU.

    Raises:
        ValueError: torch finds no GPU.
    """
    if gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no GPU on this machine")
    return torch.device("cuda" if gpu else "cpu")


def dataset_backbone(root: Path, embedding: Embedding) -> PretrainedBackbone:
    """The backbone that embedded a dataset, with the weights that lie in the dataset's folder.

    Raises:
        ValueError: they are missing, or others than those that the dataset was made with.
    """
    place = root / BACKBONE_FILE
    if not place.exists():
        raise ValueError(f"dataset {root} has lost {BACKBONE_FILE}, the weights of its backbone {embedding.backbone}: embed the images again")
    with local_copy(place) as file:
        backbone = open_backbone(embedding.backbone, str(file), embedding.size, embedding.pool)
    if (backbone.digest(), backbone.preprocessing) != (embedding.weights, embedding.preprocessing):
        raise ValueError(f"{place} is not the backbone that made the features of {root}: embed the images again")
    return backbone


def _check_rows(name: str, shape: list[int], embedded: dict[str, Any] | None, manifest: Manifest) -> None:
    """Check that a dataset's rows are of a run's shape, and features of the run's backbone.

    Raises:
        ValueError: they are not.
    """
    if shape != manifest.shape:
        also = f" or images of shape {embedded['shape']}" if embedded else ""
        raise ValueError(f"run {name} takes rows of shape {shape}{also}, dataset {manifest.dataset!r} has {manifest.shape}")
    theirs = manifest.embedding
    if embedded and theirs and (theirs.weights, theirs.preprocessing) != (embedded["weights"], embedded["preprocessing"]):
        raise ValueError(f"run {name} takes features of {embedded['backbone']} (weights {embedded['weights']}), dataset {manifest.dataset!r} has those of "
                         f"{theirs.backbone} (weights {theirs.weights}, {theirs.preprocessing})")  # fmt: skip


def load_method(
    folder: Path, manifest: Manifest | None = None, device: torch.device = CPU, images: bool = False, place: Path | None = None,
) -> Method:  # fmt: skip
    """Load the trained method of a run onto a device.

    Args:
        manifest: a dataset that the method must fit: of the run's rows, or of images that its backbone can embed.
        images: whether a method that was trained on embedded images takes images, too if there is no ``manifest``.
        place: the run's last checkpoint, if it is known.

    Raises:
        ValueError: the run has no checkpoint, or does not fit the dataset.
    """
    config = runs.read_config(folder)
    place = place or checkpoint.latest(folder / "checkpoints")
    if place is None:
        raise ValueError(f"run {folder.name} has no checkpoint yet")
    state, embedded = checkpoint.read_state(place), config.get("embedding")
    embedding = Embedding.of(embedded)
    if embedding is None or (manifest.shape != embedding.shape if manifest else not images):
        embedding = None  # rows as the method was trained on
    if manifest and not embedding:
        _check_rows(folder.name, state["shape"], embedded, manifest)
    kind = find_method(state["method"])
    if "pretrained" in config["own"]:
        config["own"]["pretrained"] = "none"  # the weights are in the checkpoint
    method: Method = kind(build(kind.Config, config["own"]), tuple(state["shape"]), state["classes"], state["bits"])
    checkpoint.load(place, method, optimizers=False)
    method.to(device).train(False)
    if not embedding:
        return method
    return cast("Method", OnImages(method, dataset_backbone(to_path(config["dataset"]), embedding).to(device), tuple(embedding.shape)))
