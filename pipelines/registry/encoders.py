"""Encoders by name: the encoder of a run, or of a registered model."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import yaml

from data.filesystem import to_path
from data.manifest import Manifest
from models.encoder import HashEncoder, encode_all
from pipelines.registry.connection import connect, default_uri, one_line_errors
from pipelines.training import checkpoint, runs
from pipelines.training.restore import device_for, load_method


class Encoder(Protocol):
    """Maps stored rows to packed codes; knows the shape of a row and the code length."""

    shape: tuple[int, ...]
    bits: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) to (n, bits / 8) uint8."""


class RunEncoder:
    """The encoder of a run's last checkpoint; with its backbone, if it was trained on embedded images and rows are not given."""

    def __init__(self, folder: Path, place: Path, gpu: bool = False, rows: Manifest | None = None) -> None:
        """Args:
        place: the checkpoint.
        rows: the dataset whose rows are encoded; None for images.
        """
        method = load_method(folder, rows, device_for(gpu), images=True, place=place)
        self.encoder, self.shape, self.bits = HashEncoder(method.encoder()).eval(), method.shape, method.bits

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return encode_all(self.encoder, torch.from_numpy(rows)).numpy()


class RegisteredEncoder:
    """A registered encoder as a function of numpy arrays."""

    def __init__(self, model: str, uri: str, gpu: bool = False) -> None:
        """Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``, or a folder that one was copied to.
        uri: tracking URI of the registry; "" for a folder.
        gpu: whether to encode on a GPU.

        Raises:
            ValueError: there is no such model.
        """
        if uri:
            connect(uri)
        import mlflow  # noqa: PLC0415

        with one_line_errors(uri or model):
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
        return dict(_version(model).tags)


def _version(model: str) -> Any:
    """The registered version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` is, by the tracking server that is connected."""
    import mlflow  # noqa: PLC0415

    client, rest = mlflow.MlflowClient(), model.removeprefix("models:/")
    return client.get_model_version_by_alias(*rest.rsplit("@", 1)) if "@" in rest else client.get_model_version(*rest.rsplit("/", 1))


class Resolved(NamedTuple):
    """The model that a name stands for now.

    Attributes:
        name: its own, which stands for nothing else later: of a run RUN@CHECKPOINT, where RUN is its id or path as given.
        run, checkpoint: whose encoder it is; the checkpoint of a model that an earlier version registered is "".
        source: of a registered model, where it is kept; no other model has it.
    """

    name: str
    run: str
    checkpoint: str
    source: str


def resolve(model: str, storage: str, tracking: str) -> Resolved:
    """The version that an alias stands for, and the last checkpoint of a run; a version stands for itself.

    Raises:
        ValueError: there is no such model or run, the registry cannot be reached, or a run has another last checkpoint than the given one.
    """
    if not model.startswith("models:/"):
        folder, place = _find_checkpoint(model, storage)
        return Resolved(f"{_split(model)[0]}@{place.name}", folder.name, place.name, "")
    uri = registry_uri(model, storage, tracking)
    connect(uri)
    with one_line_errors(uri):
        found = _version(model)
    return Resolved(f"models:/{found.name}/{found.version}", found.tags.get("run_id", ""), found.tags.get("checkpoint", ""), found.source)


def _split(model: str) -> tuple[str, str]:
    """Run and checkpoint of RUN@CHECKPOINT; "" if no checkpoint is named."""
    run, _, named = model.rpartition("@")
    return (run, named) if run and checkpoint.NAME.fullmatch(named) else (model, "")


def found_by_workers(model: str, storage: str) -> str:
    """A model by a name under which processes with another working folder find it: a run that is given by its path has an absolute one.

    Raises:
        ValueError: there is no such run.
    """
    run, named = _split(model)
    if not run or model.startswith("models:/"):
        return model
    folder = runs.find_run(run, storage)
    return model if folder == to_path(storage) / run else f"{folder.resolve()}{named and '@'}{named}"


def _find_checkpoint(model: str, storage: str) -> tuple[Path, Path]:
    """The folder of a run, and its last checkpoint.

    Raises:
        ValueError: there is no such run, it has no checkpoint, or RUN@CHECKPOINT names one that is not the last.
    """
    run, named = _split(model)
    folder = runs.find_run(run, storage)
    place = checkpoint.latest(folder / "checkpoints")
    if place is None:
        raise ValueError(f"run {folder.name} has no checkpoint yet")
    if named and named != place.name:
        raise ValueError(f"run {folder.name} has been trained on, from checkpoint {named} to {place.name}: encode again, and index the new codes")
    return folder, place


def registry_uri(model: str, storage: str, tracking: str) -> str:
    """The tracking URI of a registered model's registry; "" for a run, which needs none."""
    if not model.startswith("models:/"):
        return ""
    return tracking or default_uri(storage)


def check_encodes(model: Resolved, codes: str, storage: str, tracking: str) -> None:
    """Check that a model is the one that made the codes of an index: the same version, or another name of the same run's encoder.

    Args:
        codes: the model that the index names.

    Raises:
        ValueError: it is another model, or the index does not say which version of an alias it was.
    """
    if model.name == codes:
        return
    if codes.startswith("models:/") and "@" in codes:
        raise ValueError(f"the index names its model as {codes}, and an alias can move: encode and index again, then it names the version")
    if codes.startswith("models:/"):
        known = resolve(codes, storage, tracking)
        run, made = known.run, known.checkpoint
    else:
        run, made = _split(Path(codes).name)
    if not run or run != model.run or (made and model.checkpoint and made != model.checkpoint):
        raise ValueError(f"the codes of the index are of {codes}, not of {model.name}: search with the model that encoded it")


def open_encoder(model: str, storage: str, tracking: str, gpu: bool = False, rows: Manifest | None = None) -> Encoder:
    """Open the encoder of ``models:/NAME@ALIAS`` (or ``/VERSION``), or of a run's id or RUN@CHECKPOINT, on a GPU or on the CPU.

    Args:
        rows: the dataset whose rows are encoded; None for images.

    Raises:
        ValueError: it does not exist, or does not fit the dataset.
    """
    if model.startswith("models:/"):
        return RegisteredEncoder(model, registry_uri(model, storage, tracking), gpu)
    return RunEncoder(*_find_checkpoint(model, storage), gpu, rows)


def download(model: str, uri: str, folder: Path) -> None:
    """Copy a registered model to a folder that does not exist yet; the copy can be loaded without the registry.

    Raises:
        ValueError: there is no such model, or the registry cannot be reached.
    """
    connect(uri)
    import mlflow  # noqa: PLC0415

    folder.mkdir()
    with one_line_errors(uri):
        mlflow.artifacts.download_artifacts(model, dst_path=str(folder))
    described = yaml.safe_load((folder / "MLmodel").read_text())
    described.pop("model_id", None)  # MLflow would look it up in the registry
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
