"""Sends one training run's record to MLflow."""

import contextlib
import math
from pathlib import Path
from typing import Any

from data.filesystem import local_copy, to_path
from pipelines.registry.connection import connect, one_line_errors


class RunTracker:
    """Sends one run's record to MLflow."""

    def __init__(self, uri: str, name: str, tracked: str = "") -> None:
        """Args:
            uri: tracking URI.
            name: the run's id in hashbridge.
            tracked: MLflow's id of a run to continue; "" for a new one.
        """
        import mlflow  # noqa: PLC0415

        self.uri, self.client = uri, connect(uri)
        with one_line_errors(uri):
            run = mlflow.start_run(run_id=tracked or None, run_name=None if tracked else name, log_system_metrics=True)
        self.tracked = run.info.run_id

    def start(self, parameters: dict[str, Any], dataset: dict[str, str], rows: int) -> None:
        """Log parameters, and the dataset's manifest as an input."""
        import mlflow  # noqa: PLC0415
        from mlflow.data.dataset_source_registry import resolve_dataset_source  # noqa: PLC0415
        from mlflow.data.meta_dataset import MetaDataset  # noqa: PLC0415

        with one_line_errors(self.uri):
            mlflow.log_params(parameters)
            mlflow.set_tags({f"dataset_{key}": value for key, value in dataset.items()} | {"dataset_rows": str(rows)})
            source = resolve_dataset_source(dataset["path"])
            described = MetaDataset(source, name=dataset["name"], digest=dataset["digest"])  # type: ignore[abstract]
            mlflow.log_input(described, context="training")

    def epoch(self, record: dict[str, Any]) -> None:
        """Log a finished epoch's terms, speed and picture. Thread-safe; sending twice changes nothing."""
        values = {f"loss/{name.replace(' ', '_')}": value for name, value in record["terms"].items()}
        with one_line_errors(self.uri):
            self._log(values | {"images_per_second": record["images_per_second"]}, record["time"], record["epoch"])
            if "picture" in record:
                with local_copy(to_path(record["picture"])) as file:
                    self.client.log_artifact(self.tracked, str(file), "plots")

    def _log(self, values: dict[str, float], seconds: float, step: int) -> None:
        """Log metrics with a time stamp; MLflow keeps equal entries once."""
        from mlflow.entities import Metric  # noqa: PLC0415

        self.client.log_batch(self.tracked, [Metric(name, value, int(seconds * 1000), step) for name, value in values.items() if math.isfinite(value)])

    def finish(self, metrics: dict[str, float], folder: Path) -> None:
        """Log the final metrics, plots and files, and end the run. Sending twice changes nothing."""
        import mlflow  # noqa: PLC0415

        with one_line_errors(self.uri):
            self._log({name.replace(" ", "_"): value for name, value in metrics.items()}, (folder / "result.json").stat().st_mtime, 0)
            for name in ("config.json", "result.json"):
                with local_copy(folder / name) as file:
                    self.client.log_artifact(self.tracked, str(file))
            if (folder / "plots").is_dir():
                with local_copy(folder / "plots") as plots:
                    self.client.log_artifacts(self.tracked, str(plots), "plots")
            self.client.set_terminated(self.tracked, "FINISHED")
            mlflow.end_run()

    def fail(self) -> None:
        """End the run as failed; ignores an unreachable server."""
        import mlflow  # noqa: PLC0415

        with contextlib.suppress(Exception):
            mlflow.end_run("FAILED")
