"""The first trials of a search: the method's defaults, its papers' settings, the best of other searches, here or in MLflow, and values from files."""

import ast
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.filesystem import to_path
from pipelines.console.config import mask_passwords, read_yaml
from pipelines.training import runs
from tuning.objectives import maximised
from tuning.space import RESERVED, Space

BEST = 3  # trials that are taken from another search
Values = dict[str, Any]


class Given:
    """What a space draws from: given values, moved into the bounds; a value that is not given is the bounds' middle."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The given value, within the bounds."""
        return min(max(self._number(name, math.sqrt(low * high) if log else (low + high) / 2), low), high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """The given value, within the bounds."""
        return min(max(round(self._number(name, (low + high) / 2)), low), high)

    def _number(self, name: str, middle: float) -> float:
        value = self.values.get(name, middle)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"--start gives {name} {value!r}, but it must be a number")
        return float(value)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """The given value if it is one of the choices, else the first."""
        return self.values[name] if self.values.get(name) in choices else choices[0]


def first_trials(asked: str, space: Space, method: Any, own: Values, bits: int, storage: str, objective: str, tracking: str = "") -> dict[str, Values]:
    """The drawn values of the first trials, each by where it comes from.

    Args:
        asked: with commas: ``default``; ``paper``; ``mlflow``, for the best trial of each of the last searches of this method by this objective
            that the tracking server has; the name or folder of a search, of which the best trials are taken; a YAML file, as a search's
            ``best.yaml``; ``none``.
        own: the method's hyper-parameters as they are without a search.
        storage: folder of the searches.
        objective: by which trials of another search are the best.
        tracking: MLflow's address; "" for none.

    Raises:
        ValueError: a search or file does not exist, or is not of this method; MLflow has no search of it.
    """
    found: dict[str, Values] = {}
    for name in filter(None, (each.strip() for each in asked.split(","))):
        if name == "default":
            found[name] = own | {RESERVED: bits}
        elif name == "paper":
            if name in method.presets:
                found[name] = asdict(method.preset(name)) | {RESERVED: bits}
        elif name == "mlflow":
            found |= {f"mlflow: {run}": own | {RESERVED: bits} | values for run, values in _tracked(tracking, method.name, objective).items()}
        elif name != "none":
            others = _others(name, method.name, storage, objective)
            found |= {f"{name}: {which}": own | {RESERVED: bits} | values for which, values in others.items()}
    drawn: dict[str, Values] = {}
    for name, values in found.items():
        within = space(Given(values))
        moved = [f"{field} {values[field]} to {value}" for field, value in within.items() if field in values and values[field] != value]
        if moved:
            print(f"first trial {name}: moved into the space's bounds: {', '.join(moved)}", file=sys.stderr)
        if within not in drawn.values():
            drawn[name] = within
    return drawn


def _tracked(uri: str, method: str, objective: str) -> dict[str, Values]:
    """Values of the best trials of the last searches that MLflow has."""
    from pipelines.registry.search_tracking import best_of_searches  # noqa: PLC0415  mlflow is slow to import

    if not uri:
        raise ValueError("--start mlflow needs a tracking server, but --tracking is none")
    best = best_of_searches(uri, method, objective, maximised(objective), BEST)
    if not best:
        raise ValueError(f"--start mlflow: {mask_passwords(uri)} has no finished trial of a search of {method} by {objective}")
    return {run: {name: _read(value) for name, value in values.items()} for run, values in best.items()}


def _read(text: str) -> Any:
    """A value that MLflow keeps as text; YAML would leave 1e-05 a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _others(name: str, method: str, storage: str, objective: str) -> dict[str, Values]:
    """Values of another search's best trials, or of a file."""
    if name.endswith((".yaml", ".yml")):
        row = read_yaml(name)
        _check_method(name, str(row.get("method", method)), method)
        return {"its values": _drawable(row)}
    folder = next((each for each in (to_path(storage) / name, Path(name)) if (each / "search.json").is_file()), None)
    if folder is None:
        raise ValueError(f"--start names {name!r}, which is neither default, paper, mlflow, a YAML file, nor a search in {storage}")
    _check_method(name, str(runs.read_json(folder / "search.json").get("given", {}).get("method", "")), method)
    try:
        rows = pq.read_table(folder / "results" / "trials.parquet").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"--start {name}: the search has no results yet: finish it first") from error
    ended = [row for row in rows if row.get(objective) is not None and math.isfinite(row[objective]) and row["status"] == "complete"]
    if not ended:
        raise ValueError(f"--start {name}: none of its trials has {objective}")
    best = sorted(ended, key=lambda row: row[objective], reverse=maximised(objective))[:BEST]
    return {f"trial {row['number']}": _drawable(row) for row in best}


def _check_method(name: str, other: str, method: str) -> None:
    if other != method:
        raise ValueError(f"--start {name} is of method {other}, the search of {method}")


def _drawable(row: Values) -> Values:
    """What can be a drawn value."""
    return {key: value for key, value in row.items() if isinstance(value, int | float | str) and not isinstance(value, bool)}
