"""Command: train the rows of a paper's ablation table and print our figures beside the paper's."""

import statistics
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from data.filesystem import to_path
from data.manifest import Manifest
from models.hyperparameters import AblationRow
from models.registry import METHODS, find_method
from pipelines import train
from pipelines.console.config import option
from pipelines.training import runs
from pipelines.training.options import TrainOptions, make_options, method_fields

SAME = ("method", "source", "target", "bits", "epochs", "steps_per_epoch", "least_steps", "seed", "own")  # options by which a finished run is reused

__all__ = ["Config", "make_config", "method_fields", "run"]


@dataclass
class Config(TrainOptions):
    """Options of ``hashbridge ablate``: those of ``train``, and which runs to make."""

    both: bool = option(False, "train from target to source, too")
    seeds: str = option("0", "seeds, as 0,1,2")
    storage: str = option("runs/ablation", "folder of the runs; a row whose run is there is not trained again, one that was cut off goes on")
    seed: int = field(default=0, init=False)
    resume: str = field(default="", init=False)
    plots: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not find_method(self.method).ablation:
            named = ", ".join(name for name, method in METHODS.items() if method.ablation)
            raise ValueError(f"{self.method} has no ablation table; these have one: {named}")
        if self.both and not self.source:
            raise ValueError("--both trains in both directions, but --source is missing")
        self.seed_list()

    def seed_list(self) -> list[int]:
        """The seeds as numbers.

        Raises:
            ValueError: the option is not a list of whole numbers.
        """
        try:
            return [int(each) for each in self.seeds.split(",")]
        except ValueError:
            raise ValueError(f"--seeds is {self.seeds!r}, but must be whole numbers, such as 0,1,2") from None


make_config = partial(make_options, kind=Config)


def _settings(config: Config, row: AblationRow, direction: tuple[str, str], seed: int) -> TrainOptions:
    """The options of one row's run."""
    given = {each.name: getattr(config, each.name) for each in fields(TrainOptions)}
    source, target = direction
    own = config.own
    if row.method:  # its own setting, with what the user changed and it has, too
        own, usual = asdict(find_method(row.method).preset(config.preset)), asdict(find_method(config.method).preset(config.preset))
        own |= {name: value for name, value in config.own.items() if name in own and value != usual[name]}
    return TrainOptions(**given | {"method": row.method or config.method, "source": source, "target": target, "seed": seed, "own": own | row.changes})


def finished_and_cut_off(wanted: TrainOptions) -> tuple[dict[str, Any] | None, Path | None]:
    """Look for a run with the same options: its result if it has ended, and its folder if it was cut off."""
    root, digest = to_path(wanted.dataset), ""
    cut_off = None
    for folder in sorted(each.parent for each in to_path(wanted.storage).glob("*/config.json")):
        saved = runs.read_config(folder)
        if to_path(saved["dataset"]).resolve() != root.resolve() or any(saved.get(name) != getattr(wanted, name) for name in SAME):
            continue
        if not (folder / "result.json").is_file():
            cut_off = folder
            continue
        result, digest = runs.read_result(folder), digest or Manifest.read(root).digest()
        if result["dataset"] == digest:  # not of a dataset that was ingested again since
            return result, cut_off
    return None, cut_off


def result_of(wanted: TrainOptions) -> dict[str, Any]:
    """The result of a run: from an earlier run with the same options if there is one, otherwise after training."""
    result, cut_off = finished_and_cut_off(wanted)
    if result is not None:
        print(f"run {result['run_id']} has this result already")
        return result
    if cut_off is None:
        return train.run(wanted)
    return train.run(make_options({"resume": cut_off.name, "storage": wanted.storage, "tracking": wanted.tracking}))


def _named(direction: tuple[str, str]) -> str:
    """Name of a direction: "source -> target", or the only domain."""
    return " -> ".join(filter(None, direction))


def _cell(values: list[float]) -> str:
    """Mean over the seeds in percent, with standard deviation if there are several."""
    spread = f" ±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _papers(figures: dict[str, float], direction: str) -> str:
    """The paper's figure for this direction, or its figures for others with their names."""
    return f"{figures[direction]:.1f}" if direction in figures else ", ".join(f"{value:.1f} ({name})" for name, value in figures.items())


def show(config: Config, table: dict[str, dict[str, Any]]) -> None:
    """Print the table: a block for each direction, a line for each row."""
    for name, rows in table.items():
        print(f"\n{config.method}, {config.bits} bits, {name}: percent, last epoch, seeds {config.seeds}, preset {config.preset}")
        columns = find_method(config.method).table
        widths = [max(14, len(column) + 2) for column in columns]
        print(f"  {'':<34}" + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)) + "   the paper's")
        for row, cells in rows.items():
            ours = "".join(f"{_cell(cells[column]) if cells[column] else '-':>{width}}" for column, width in zip(columns, widths, strict=True))
            failed = f"; {len(cells['failed'])} failed" if cells["failed"] else ""
            print(f"  {row:<34}{ours}   {_papers(cells['paper'], name)}{failed}")


def _train_row(config: Config, row: AblationRow, direction: tuple[str, str]) -> dict[str, Any]:
    """A row's figures by seed, its run ids, and the messages of failed runs."""
    columns = find_method(config.method).table
    cells: dict[str, Any] = {column: [] for column in columns} | {"paper": row.figures, "runs": [], "failed": []}
    for seed in config.seed_list():
        print(f"\n{_named(direction)}: {row.name}, seed {seed}")
        try:
            result = result_of(_settings(config, row, direction, seed))
        except FloatingPointError as error:
            cells["failed"].append(str(error))
            print(error)
            continue
        cells["runs"].append(result["run_id"])
        for column in set(columns) & set(result["metrics"]):
            cells[column].append(result["metrics"][column])
    return cells


def run(config: Config) -> dict[str, Any]:
    """Train every row that has no result yet, print the table, and return it with the run ids.

    A diverged run is counted as failed; the others continue.
    """
    directions = [(config.source, config.target), *([(config.target, config.source)] if config.both else [])]
    rows = find_method(config.method).ablation
    table = {_named(direction): {row.name: _train_row(config, row, direction) for row in rows} for direction in directions}
    show(config, table)
    return {"table": table, "options": asdict(config)}
