"""Versions of a registered model: registration, tags and aliases."""

import contextlib
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.registry.connection import connect, one_line_errors

LEFT = 1800  # seconds after which an unfinished promotion is considered dead


def register(uri: str, tracked: str, encoder: Any, example: np.ndarray, name: str, tags: dict[str, str]) -> int:
    """Log an encoder as a torch.export program, register it, and give the version the alias ``challenger``.

    Args:
        encoder: module of stored rows -> packed codes.
        example: a few rows, (n, channels, h, w) uint8 or (n, features) float32.

    Returns:
        The version's number.
    """
    client = connect(uri)
    import mlflow  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from mlflow.models import infer_signature  # noqa: PLC0415

    with torch.no_grad():
        codes = encoder(torch.from_numpy(example)).numpy()
    with one_line_errors(uri), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        context = mlflow.start_run(run_id=tracked) if tracked else mlflow.start_run(run_name=name)
        with context:
            info = mlflow.pytorch.log_model(
                encoder, name="encoder", signature=infer_signature(example, codes), input_example=example,
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"mlflow=={mlflow.__version__}"],
            )  # fmt: skip
        version = mlflow.register_model(info.model_uri, name, tags=tags)
        client.set_registered_model_alias(name, "challenger", version.version)
    return int(version.version)


def version_tags(uri: str, name: str, alias: str) -> tuple[int, dict[str, str]] | None:
    """Number and tags of the version with an alias; None if there is none."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client = connect(uri)
    try:
        version = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        with one_line_errors(uri):
            raise
    return int(version.version), dict(version.tags)


def tag_version(uri: str, name: str, version: int, tags: dict[str, str]) -> None:
    """Set tags of a version."""
    client = connect(uri)
    with one_line_errors(uri):
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)


def set_champion(uri: str, name: str, version: int, tags: dict[str, str]) -> None:
    """Tag a version with the reasons, then give it the alias ``champion``."""
    tag_version(uri, name, version, tags)
    with one_line_errors(uri):
        connect(uri).set_registered_model_alias(name, "champion", str(version))


@contextlib.contextmanager
def promotion(uri: str, name: str) -> Iterator[None]:
    """Hold the exclusive right to promote a model. The lock is a registered model, whose name the server grants only once.

    If its holder was killed, the lock expires after ``LEFT`` seconds.

    Raises:
        ValueError: another promotion holds the lock.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client, lock = connect(uri), f"{name}.promotion"

    def taken() -> bool:
        try:
            client.create_registered_model(lock, description="held while a promotion decides")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return False
        return True

    with one_line_errors(uri):
        if not taken():
            with contextlib.suppress(MlflowException):
                held = client.get_registered_model(lock).creation_timestamp / 1000
                if time.time() - held > LEFT:
                    client.delete_registered_model(lock)
            if not taken():
                raise ValueError(f"another promotion of {name!r} is running: try again later; if it was killed, in {LEFT // 60} minutes")
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException):
            client.delete_registered_model(lock)


def dump(tags: dict[str, Any]) -> dict[str, str]:
    """Tags as text; values that are not text are written as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in tags.items()}
