"""Restores the trained method of a run from its last checkpoint."""

from pathlib import Path

import torch

from data.manifest import Manifest
from models.method import Method
from models.registry import find_method
from pipelines.console.config import build
from pipelines.training import checkpoint, runs

CPU = torch.device("cpu")


def device_for(gpu: bool) -> torch.device:
    """The first GPU if one is asked for, otherwise the CPU.

    Raises:
        ValueError: torch finds no GPU.
    """
    if gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no GPU on this machine")
    return torch.device("cuda" if gpu else "cpu")


def load_method(folder: Path, manifest: Manifest | None = None, device: torch.device = CPU) -> Method:
    """Load the trained method of a run onto a device.

    Args:
        manifest: a dataset that the method must fit.

    Raises:
        ValueError: the run has no checkpoint, or its rows have another shape than the dataset's.
    """
    config = runs.read_config(folder)
    place = checkpoint.latest(folder / "checkpoints")
    if place is None:
        raise ValueError(f"run {folder.name} has no checkpoint yet")
    state = checkpoint.read_state(place)
    if manifest and state["shape"] != manifest.shape:
        raise ValueError(f"run {folder.name} takes rows of shape {state['shape']}, dataset {manifest.dataset!r} has {manifest.shape}")
    kind = find_method(state["method"])
    if "pretrained" in config["own"]:
        config["own"]["pretrained"] = "none"  # the weights are in the checkpoint
    method: Method = kind(build(kind.Config, config["own"]), tuple(state["shape"]), state["classes"], state["bits"])
    checkpoint.load(place, method, optimizers=False)
    return method.to(device).train(False)
