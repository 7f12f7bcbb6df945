"""Command: register a run's encoder in the MLflow registry, with alias challenger."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from data.filesystem import to_path
from data.manifest import Manifest
from models.encoder import HashEncoder
from pipelines.console.config import option, positional, required
from pipelines.registry import versions
from pipelines.registry.connection import default_uri
from pipelines.training import checkpoint, runs
from pipelines.training.restore import load_method


@dataclass
class Config:
    """Options of ``hashbridge register``."""

    run: str = positional("a run's id")
    name: str = required("name of the registered model")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI (default: MLFLOW_TRACKING_URI, else SQLite in the storage)")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w .-]*", self.name):
            raise ValueError(f"--name is {self.name!r}, but must consist of letters, digits, spaces and _ . -, so that models:/NAME@ALIAS finds it")


def run(config: Config) -> dict[str, Any]:
    """Register; returns name, version and tags."""
    folder = runs.find_run(config.run, config.storage)
    saved, result = runs.read_config(folder), runs.read_result(folder)
    manifest = Manifest.read(to_path(saved["dataset"]))
    if manifest.digest() != result["dataset"]:
        raise ValueError(f"dataset {saved['dataset']} has changed since run {folder.name}: train again, so that the figures belong to it")
    uri = config.tracking or default_uri(str(folder.parent))
    place = checkpoint.latest(folder / "checkpoints")
    method = load_method(folder, images=True, place=place)
    assert place is not None  # or it could not be loaded
    encoder, shape = HashEncoder(method.encoder()).eval(), (4, *method.shape)
    example = torch.randint(0, 256, shape, dtype=torch.uint8) if len(method.shape) == 3 else torch.rand(shape)
    embedded = manifest.embedding  # then the registered model takes images, and is compared on them
    path, digest = (embedded.images, embedded.digest) if embedded else (str(to_path(saved["dataset"]).resolve()), result["dataset"])
    tags = versions.dump({
        "method": result["method"], "bits": result["bits"], "source": result["source"], "target": result["target"], "seed": result["seed"],
        "run_id": folder.name, "checkpoint": place.name, "oracle": result["oracle"],
        "dataset": manifest.dataset, "dataset_digest": digest, "dataset_path": path,
        "backbone": f"{embedded.backbone} {embedded.weights}" if embedded else "",
        "protocol": "+".join(sorted({name.split("/")[0] for name in result["metrics"] if "/" in name})),
    } | {f"metric.{name.replace('/', '.')}": f"{value:.6f}" for name, value in result["metrics"].items()})  # fmt: skip
    version = versions.register(uri, saved["tracked"], encoder, example.numpy(), config.name, tags)
    print(f"models:/{config.name}/{version} registered, alias challenger (run {folder.name})")
    return {"name": config.name, "version": version, "uri": f"models:/{config.name}@challenger", "tags": tags}
