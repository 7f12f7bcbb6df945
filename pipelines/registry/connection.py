"""Connects to an MLflow server or SQLite file, and turns MLflow's errors into one line."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data.filesystem import is_local, to_path
from pipelines.console import cluster
from pipelines.console.config import mask_passwords

EXPERIMENT = "hashbridge"


def default_uri(storage: str) -> str:
    """The tracking URI for a storage folder: MLFLOW_TRACKING_URI if set, otherwise SQLite in the folder.

    Raises:
        ValueError: the folder is in a bucket, where SQLite cannot be.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and not is_local(to_path(storage)):
        raise ValueError(f"runs in {storage} need a tracking server: set MLFLOW_TRACKING_URI to one, or give --tracking")
    return given or f"sqlite:///{sqlite_path(Path(storage).resolve() / 'mlflow.db')}"


def sqlite_path(path: Path) -> Path:
    """A path that can be part of a SQLite URI.

    Raises:
        ValueError: it contains a character that ends the path in a URI, so that the database would be elsewhere.
    """
    odd = [each for each in "?#%" if each in str(path)]
    if odd:
        raise ValueError(f"{path} contains {odd[0]!r}, which a database's address cannot contain: use another --storage")
    return path


@contextlib.contextmanager
def one_line_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into a ValueError of one line that names the server."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())
        if "Max retries exceeded" in text or "Connection" in text or "timed out" in text:
            text = "it does not answer"
        raise ValueError(mask_passwords(f"tracking server {uri}: {text[:300]} (--tracking names another, or `none`)")) from error


def _log_in(uri: str) -> str:
    """Move user and password from a tracking URI to MLflow's environment variables, which it never prints; returns the URI without them."""
    scheme, _, rest = uri.partition("://")
    account, at, host = rest.rpartition("@")
    if not (at and scheme.startswith("http")):
        return uri
    user, _, password = account.partition(":")
    os.environ.update(MLFLOW_TRACKING_USERNAME=unquote(user), MLFLOW_TRACKING_PASSWORD=unquote(password))
    return f"{scheme}://{host}"


def connect(uri: str) -> Any:
    """Connect an MLflow client, check that the server answers, and make it this process's tracking server.

    Raises:
        ValueError: the server cannot be reached, or the URI is a local file while the cluster has several nodes.
    """
    if "://" not in uri and uri != "databricks":
        raise ValueError(f"--tracking is {uri!r}, but must be a server's address, such as http://host:5000, or sqlite:///FILE")
    uri = _log_in(uri)
    if uri.startswith("sqlite:") and cluster.count_nodes() > 1:
        raise ValueError(
            f"tracking by {uri} is a local file, but the cluster has {cluster.count_nodes()} nodes: set MLFLOW_TRACKING_URI to a server "
            "(see docs/cluster.md), or give --tracking none"
        )
    os.environ |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "alembic.runtime.migration", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    import mlflow  # noqa: PLC0415  takes three seconds

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with one_line_errors(uri):
        _set_uri(mlflow, uri)
        client = mlflow.MlflowClient(uri)
        if client.get_experiment_by_name(EXPERIMENT) is None:
            place = None
            if uri.startswith("sqlite:///"):
                place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").resolve().as_uri()
            client.create_experiment(EXPERIMENT, artifact_location=place)
        mlflow.set_experiment(EXPERIMENT)
    return client


def _set_uri(mlflow: Any, uri: str) -> None:
    """Set the process's tracking URI without changing the user's environment variables."""
    given = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    for name, value in given.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
