"""Encoders by name: the encoder of a run, or of a registered model."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data.manifest import Manifest
from models.encoder import HashEncoder, encode_all
from pipelines.registry.connection import connect, default_uri, one_line_errors
from pipelines.training import runs
from pipelines.training.restore import device_for, load_method


class Encoder(Protocol):
    """Maps stored rows to packed codes; knows the shape of a row and the code length."""

    shape: tuple[int, ...]
    bits: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) to (n, bits / 8) uint8."""


class RunEncoder:
    """The encoder of a run's last checkpoint; with its backbone, if it was trained on embedded images and rows are not given."""

    def __init__(self, folder: Path, gpu: bool = False, rows: Manifest | None = None) -> None:
        """Args:
        rows: the dataset whose rows are encoded; None for images.
        """
        method = load_method(folder, rows, device_for(gpu), images=True)
        self.encoder, self.shape, self.bits = HashEncoder(method.encoder()).eval(), method.shape, method.bits

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return encode_all(self.encoder, torch.from_numpy(rows)).numpy()


class RegisteredEncoder:
    """A registered encoder as a function of numpy arrays."""

    def __init__(self, model: str, uri: str, gpu: bool = False) -> None:
        """Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        uri: tracking URI of the registry.
        gpu: whether to encode on a GPU.

        Raises:
            ValueError: there is no such model.
        """
        connect(uri)
        import mlflow  # noqa: PLC0415

        with one_line_errors(uri):
            info = mlflow.models.get_model_info(model)
            loader = info.flavors.get("python_function", {}).get("loader_module")
            if loader != "mlflow.pytorch" or info.signature is None:  # other loaders could run code of their own
                raise ValueError(f"{model} was not registered by `hashbridge register`")
            self.loaded = mlflow.pyfunc.load_model(model, model_config={"device": str(device_for(gpu))})
        spec = info.signature.inputs.inputs[0]
        self.shape = tuple(spec.shape[1:])
        self.bits = int(info.signature.outputs.inputs[0].shape[-1]) * 8

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Encode rows (n, ...) as stored to (n, bits / 8) uint8 codes."""
        return np.asarray(self.loaded.predict(np.ascontiguousarray(rows))).astype(np.uint8, copy=False)

    def tags(self, model: str) -> dict[str, str]:
        """The tags of the version that a model URI refers to."""
        import mlflow  # noqa: PLC0415

        rest = model.removeprefix("models:/")
        client = mlflow.MlflowClient()
        if "@" in rest:
            return dict(client.get_model_version_by_alias(*rest.split("@")).tags)
        return dict(client.get_model_version(*rest.split("/")).tags)


def registry_uri(model: str, storage: str, tracking: str) -> str:
    """The tracking URI of a registered model's registry; "" for a run, which needs none."""
    if not model.startswith("models:/"):
        return ""
    return tracking or default_uri(storage)


def open_encoder(model: str, storage: str, tracking: str, gpu: bool = False, rows: Manifest | None = None) -> Encoder:
    """Open the encoder of ``models:/NAME@ALIAS`` (or ``/VERSION``), or of a run's id, on a GPU or on the CPU.

    Args:
        rows: the dataset whose rows are encoded; None for images.

    Raises:
        ValueError: it does not exist, or does not fit the dataset.
    """
    if model.startswith("models:/"):
        return RegisteredEncoder(model, registry_uri(model, storage, tracking), gpu)
    return RunEncoder(runs.find_run(model, storage), gpu, rows)
