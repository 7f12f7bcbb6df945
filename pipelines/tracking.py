"""Tracking and the registry: the one file that imports MLflow."""

import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from data.places import fetched, is_local, path_of
from pipelines import cluster
from pipelines.config import masked

EXPERIMENT = "hashbridge"
LEFT = 1800  # seconds after which a promotion that has not ended is taken to be dead


def default_uri(storage: str) -> str:
    """The tracking URI of a storage folder: the environment's, else SQLite beside the runs.

    Raises:
        ValueError: the runs are in a bucket, where no SQLite can be.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and not is_local(path_of(storage)):
        raise ValueError(f"runs in {storage} need a tracking server: set MLFLOW_TRACKING_URI to one, or give --tracking")
    return given or f"sqlite:///{Path(storage).resolve()}/mlflow.db"


@contextlib.contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one line that names the server."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())
        if "Max retries exceeded" in text or "Connection" in text or "timed out" in text:
            text = "it does not answer"
        raise ValueError(masked(f"tracking server {uri}: {text[:300]} (--tracking names another, or `none`)")) from error


def _log_in(uri: str) -> str:
    """A tracking URI without the user and password that it may carry: they go to where MLflow reads them from, and it does not show them."""
    scheme, _, rest = uri.partition("://")
    account, at, host = rest.rpartition("@")
    if not (at and scheme.startswith("http")):
        return uri
    user, _, password = account.partition(":")
    os.environ.update(MLFLOW_TRACKING_USERNAME=unquote(user), MLFLOW_TRACKING_PASSWORD=unquote(password))
    return f"{scheme}://{host}"


def connect(uri: str) -> Any:
    """An MLflow client of a tracking URI, checked to answer; sets it as the process's own.

    Raises:
        ValueError: it cannot be reached, or is a file where the cluster has several nodes.
    """
    if "://" not in uri and uri != "databricks":
        raise ValueError(f"--tracking is {uri!r}, but must be a server's address, as http://host:5000, or sqlite:///FILE")
    uri = _log_in(uri)
    if uri.startswith("sqlite:") and cluster.nodes() > 1:
        raise ValueError(
            f"tracking by {uri} is a file of one machine, and the cluster has {cluster.nodes()} nodes: set MLFLOW_TRACKING_URI to a server "
            "(infra/README.md), or give --tracking none"
        )
    os.environ |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "alembic.runtime.migration", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    import mlflow  # noqa: PLC0415  three seconds that `--help` need not spend

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with _one_line(uri):
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
    """Make a tracking URI the process's own, and leave its environment, which is the user's, as it is."""
    given = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    for name, value in given.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class Tracker:
    """Sends one run's record to MLflow."""

    def __init__(self, uri: str, name: str, tracked: str = "") -> None:
        """Args:
        uri: tracking URI.
        name: the run's id here.
        tracked: MLflow's id of a run to go on with; "" for a new one.
        """
        import mlflow  # noqa: PLC0415

        self.uri, self.client = uri, connect(uri)
        with _one_line(uri):
            run = mlflow.start_run(run_id=tracked or None, run_name=None if tracked else name, log_system_metrics=True)
        self.tracked = run.info.run_id

    def start(self, parameters: dict[str, Any], dataset: dict[str, str], rows: int) -> None:
        """Log parameters, and the dataset's manifest as an input."""
        import mlflow  # noqa: PLC0415
        from mlflow.data.dataset_source_registry import resolve_dataset_source  # noqa: PLC0415
        from mlflow.data.meta_dataset import MetaDataset  # noqa: PLC0415

        with _one_line(self.uri):
            mlflow.log_params(parameters)
            mlflow.set_tags({f"dataset_{key}": value for key, value in dataset.items()} | {"dataset_rows": str(rows)})
            source = resolve_dataset_source(dataset["path"])
            described = MetaDataset(source, name=dataset["name"], digest=dataset["digest"])  # type: ignore[abstract]
            mlflow.log_input(described, context="training")

    def epoch(self, record: dict[str, Any]) -> None:
        """Log a finished epoch's terms, speed and picture, from any thread; twice is as good as once."""
        values = {f"loss/{name.replace(' ', '_')}": value for name, value in record["terms"].items()}
        with _one_line(self.uri):
            self._log(values | {"images_per_second": record["images_per_second"]}, record["time"], record["epoch"])
            if "picture" in record:
                with fetched(path_of(record["picture"])) as file:
                    self.client.log_artifact(self.tracked, str(file), "plots")

    def _log(self, values: dict[str, float], seconds: float, step: int) -> None:
        """Metrics of a moment: what has the same moment, step and value is kept once."""
        from mlflow.entities import Metric  # noqa: PLC0415

        self.client.log_batch(self.tracked, [Metric(name, value, int(seconds * 1000), step) for name, value in values.items() if np.isfinite(value)])

    def finish(self, metrics: dict[str, float], folder: Path) -> None:
        """Log the final metrics, plots and files, and end the run; twice is as good as once."""
        import mlflow  # noqa: PLC0415

        with _one_line(self.uri):
            self._log({name.replace(" ", "_"): value for name, value in metrics.items()}, (folder / "result.json").stat().st_mtime, 0)
            for name in ("config.json", "result.json"):
                with fetched(folder / name) as file:
                    self.client.log_artifact(self.tracked, str(file))
            if (folder / "plots").is_dir():
                with fetched(folder / "plots") as plots:
                    self.client.log_artifacts(self.tracked, str(plots), "plots")
            self.client.set_terminated(self.tracked, "FINISHED")
            mlflow.end_run()

    def fail(self) -> None:
        """End the run as failed; says nothing where the server is gone too."""
        import mlflow  # noqa: PLC0415

        with contextlib.suppress(Exception):
            mlflow.end_run("FAILED")


class SearchTracker:
    """Sends a search's record to MLflow: a run of the search, and one below it for each trial.

    What a server does not take is said once, and the search goes on: its own folder keeps the record.
    """

    def __init__(self, uri: str, name: str, parameters: dict[str, Any], tracked: str = "") -> None:
        """Args:
        uri: tracking URI; "" for none.
        name: the search's.
        tracked: MLflow's id of a search to go on with; "" for a new one.
        """
        self.uri, self.name, self.tracked, self.warned = uri, name, tracked, False
        self.trials: dict[int, str] = {}
        self.client = connect(uri) if uri else None
        if self.client and not tracked:
            with _one_line(uri):
                self.tracked = self._new(name, {}, parameters)

    def _new(self, name: str, tags: dict[str, str], parameters: dict[str, Any]) -> str:
        from mlflow.entities import Param  # noqa: PLC0415

        assert self.client is not None
        run = self.client.create_run(self.client.get_experiment_by_name(EXPERIMENT).experiment_id, run_name=name, tags=tags)
        self.client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
        return run.info.run_id

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            with _one_line(self.uri):
                yield
        except ValueError as error:
            if not self.warned:
                print(f"note: {error}", file=sys.stderr)
            self.warned = True

    def begin(self, drawn: dict[str, Any]) -> None:
        """A trial's run, with its values."""
        if self.client and drawn["number"] not in self.trials:  # it has one where it is tried again
            values = {name: value for name, value in drawn.items() if name not in ("number", "continues")}
            with self._lenient():
                self.trials[drawn["number"]] = self._new(f"{self.name}-{drawn['number']:04d}", {"mlflow.parentRunId": self.tracked}, values)

    def epoch(self, number: int, epoch: int, result: dict[str, float]) -> None:
        """A trial's figures after an epoch."""
        from mlflow.entities import Metric  # noqa: PLC0415

        if self.client and number in self.trials:
            now = int(time.time() * 1000)
            with self._lenient():
                self.client.log_batch(self.trials[number], [Metric(name, value, now, epoch) for name, value in result.items() if np.isfinite(value)])

    def end(self, number: int, status: str) -> None:
        """The end of a trial's run."""
        if self.client and number in self.trials:
            with self._lenient():
                self.client.set_terminated(self.trials[number], status)

    def finish(self, folder: Path, values: dict[str, float], status: str) -> None:
        """The search's files and best values, and its end."""
        if self.client:
            with self._lenient(), fetched(folder) as results:
                self.client.log_artifacts(self.tracked, str(results))
                for name, value in values.items():
                    self.client.log_metric(self.tracked, f"best/{name}", value)
                self.client.set_terminated(self.tracked, status)


def register(uri: str, tracked: str, encoder: Any, example: np.ndarray, name: str, tags: dict[str, str]) -> int:
    """Log an encoder as a torch.export program, register it, and give the version the alias ``challenger``.

    Args:
        encoder: module of stored rows -> packed codes.
        example: a few rows, as (n, channels, h, w) uint8 or (n, features) float32.

    Returns:
        The version's number.
    """
    client = connect(uri)
    import mlflow  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from mlflow.models import infer_signature  # noqa: PLC0415

    with torch.no_grad():
        codes = encoder(torch.from_numpy(example)).numpy()
    with _one_line(uri), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
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
    """Number and tags of the version that has an alias; None where there is none."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client = connect(uri)
    try:
        version = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        with _one_line(uri):
            raise
    return int(version.version), dict(version.tags)


def tag_version(uri: str, name: str, version: int, tags: dict[str, str]) -> None:
    """Set tags of a version."""
    client = connect(uri)
    with _one_line(uri):
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)


def set_champion(uri: str, name: str, version: int, tags: dict[str, str]) -> None:
    """Tag a version with why, then give it the alias ``champion``."""
    tag_version(uri, name, version, tags)
    with _one_line(uri):
        connect(uri).set_registered_model_alias(name, "champion", str(version))


@contextlib.contextmanager
def promotion(uri: str, name: str) -> Iterator[None]:
    """Hold a model's one right to be promoted: the name of a registered model, which the server gives once.

    A right that its holder left, killed, falls back after ``LEFT`` seconds.

    Raises:
        ValueError: another promotion holds it.
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

    with _one_line(uri):
        if not taken():
            with contextlib.suppress(MlflowException):
                held = client.get_registered_model(lock).creation_timestamp / 1000
                if time.time() - held > LEFT:
                    client.delete_registered_model(lock)
            if not taken():
                raise ValueError(f"another promotion of {name!r} goes on: try again when it has ended, or in {LEFT // 60} minutes if it was killed")
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException):
            client.delete_registered_model(lock)


class RegisteredEncoder:
    """A registered encoder as a function of numpy arrays."""

    def __init__(self, model: str, uri: str) -> None:
        """Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        uri: tracking URI of the registry.

        Raises:
            ValueError: there is no such model.
        """
        connect(uri)
        import mlflow  # noqa: PLC0415

        with _one_line(uri):
            info = mlflow.models.get_model_info(model)
            loader = info.flavors.get("python_function", {}).get("loader_module")
            if loader != "mlflow.pytorch" or info.signature is None:  # others may bring code of their own
                raise ValueError(f"{model} is no encoder that `hashbridge register` made")
            self.loaded = mlflow.pyfunc.load_model(model)
        spec = info.signature.inputs.inputs[0]
        self.shape = tuple(spec.shape[1:])
        self.bits = int(info.signature.outputs.inputs[0].shape[-1]) * 8

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) rows as stored to (n, bits / 8) uint8 codes."""
        return np.asarray(self.loaded.predict(rows)).astype(np.uint8, copy=False)

    def tags(self, model: str) -> dict[str, str]:
        """The tags of the version that the model's name and alias stand for."""
        import mlflow  # noqa: PLC0415

        rest = model.removeprefix("models:/")
        client = mlflow.MlflowClient()
        if "@" in rest:
            return dict(client.get_model_version_by_alias(*rest.split("@")).tags)
        return dict(client.get_model_version(*rest.split("/")).tags)


def dump(tags: dict[str, Any]) -> dict[str, str]:
    """Tags as text: what is none already as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in tags.items()}
