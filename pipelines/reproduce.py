"""Command: the papers' tables on the data at hand, our figures beside the papers'."""

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from data.filesystem import to_path, write_text
from models.registry import find_method
from pipelines.console.config import flag, option, positional
from pipelines.reproduction import report
from pipelines.reproduction.cosine import by_cosine
from pipelines.reproduction.report import Blocks, Line, Place
from pipelines.reproduction.reuse import finished_and_cut_off
from pipelines.reproduction.tables import NEAREST, TABLES, Table, find_tables
from pipelines.reproduction.trials import DataSet, Pair, Shared, Trial, datasets, planned, run_trials


@dataclass
class Config:
    """Options of ``hashbridge reproduce``."""

    paper: str = positional(f"{', '.join(TABLES)}; the last are all rows in one table")
    table: int = option(0, "number of a table in the paper (default: all of its tables)")
    data: str = option("", "folder of a dataset, or of several; each table is made on all of them")
    pairs: str = option("", "directions, as photo:sketch,sketch:photo (default: all; of tables without a source, domains, as photo,sketch)")
    rows: str = option("", "names of rows, separated by semicolons (default: all)")
    presets: str = option("default", "default, paper, or both with a comma; paper is each paper's own setting, with its epochs")
    bits: str = option("", "code lengths, as 32,64 (default: the table's)")
    seeds: str = option("0,1,2", "seeds")
    epochs: int = option(10, "passes over the larger domain, of at least --least-steps each, for rows whose preset names none")
    steps_per_epoch: int = option(0, "steps of an epoch (default: rows of the larger domain / batch size)")
    least_steps: int = option(100, "fewest steps of an epoch, however small the domains are")
    threads: int = option(1, "CPU threads of a trial")
    concurrency: int = option(0, "trials at once (default: as many as the cluster has room for)")
    storage: str = option("runs/reproduce", "folder of the runs; what is there is not trained again, what was cut off goes on")
    out: str = option("", "folder of the tables and pictures (default: the paper's name in --storage)")
    figures: bool = option(False, "also draw precision-recall curves, t-SNE before and after, matching costs, and retrievals, of the first seed")

    def __post_init__(self) -> None:
        find_tables(self.paper, self.table)
        if not self.data:
            raise ValueError("--data is missing: the folder of a dataset, or of several")
        for name in ("bits", "seeds"):
            try:
                [int(each) for each in getattr(self, name).split(",") if each]
            except ValueError:
                raise ValueError(f"{flag(name)} is {getattr(self, name)!r}, but must be whole numbers, such as 0,1,2") from None
        for name in ("epochs", "threads", "least_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}, but must be at least 1")
        if not self.numbers(self.seeds):
            raise ValueError("--seeds is empty: give at least one, such as 0")
        for each in self.presets.split(","):
            if each not in ("default", "paper"):
                raise ValueError(f"--presets has {each!r}, but must be default, paper, or both with a comma")
        known = {row.name for table in find_tables(self.paper, self.table) for row in table.rows}
        for each in self.chosen_rows():
            if each not in known:
                raise ValueError(f"no row {each!r}: there are {'; '.join(sorted(known))}")

    @staticmethod
    def numbers(text: str) -> list[int]:
        """Whole numbers with commas."""
        return [int(each) for each in text.split(",") if each]

    def chosen_rows(self) -> list[str]:
        """Names of rows; empty for all."""
        return [each.strip() for each in self.rows.split(";") if each.strip()]

    def chosen_pairs(self) -> list[Pair]:
        """Directions; empty for all."""
        parts = [each.partition(":") for each in self.pairs.split(",") if each]
        return [(source, target) if colon else ("", source) for source, colon, target in parts]

    def shared(self) -> Shared:
        """What all trials share."""
        return Shared(self.storage, self.epochs, self.steps_per_epoch, self.least_steps, self.threads)


def run(config: Config) -> dict[str, Any]:
    """Train what is not there yet, and print and write the tables; returns them as records.

    Raises:
        ValueError: there is no such data, or no table can be made on it.
    """
    tables, found, shared = find_tables(config.paper, config.table), datasets(config.data), config.shared()
    _check_pairs(config, found)
    chosen = config.chosen_pairs(), config.chosen_rows(), config.presets.split(","), config.numbers(config.bits), config.numbers(config.seeds)
    plans = [planned(table, found, *chosen) for table in tables]
    if not any(plans):
        raise ValueError("nothing to train: no table has such rows on such data")
    failed = run_trials([trial for plan in plans for trial in plan], shared, config.concurrency)
    out = to_path(config.out) if config.out else to_path(config.storage) / config.paper
    texts, records = [], []
    for table, plan in zip(tables, plans, strict=True):
        blocks = report.with_means(measured(table, plan, shared, failed), table)
        texts.append(report.markdown(config.paper, table, blocks, config.numbers(config.seeds), absent(table, found)))
        records += report.rows_of(config.paper, table, blocks)
        report.bars(config.paper, table, blocks, out / f"table-{table.number}.png")
        if config.figures:
            from pipelines.reproduction.figures import draw  # noqa: PLC0415  scikit-learn is slow to import

            draw(table, plan, shared, out / f"table-{table.number}")
    text = "\n".join(texts)
    print(text)
    write_text(out / "tables.md", text)
    report.write_csv(records, out / "tables.csv")
    print(f"tables.md, tables.csv and pictures are in {out}")
    return {"records": records, "out": str(out), "options": asdict(config)}


def _check_pairs(config: Config, found: list[DataSet]) -> None:
    domains = {domain for data in found for domain in data.manifest.domains}
    for domain in {domain for pair in config.chosen_pairs() for domain in pair if domain}:
        if domain not in domains:
            raise ValueError(f"--pairs has {domain!r}, but the data have the domains {', '.join(sorted(domains))}")


def measured(table: Table, plan: list[Trial], shared: Shared, failed: dict[str, str]) -> Blocks:
    """The figures of a table's trials, by place."""
    blocks: Blocks = {}
    for (data, pair, bits), at_place in groupby(plan, lambda trial: (trial.data, trial.pair, trial.bits)):
        place = Place(data, " -> ".join(filter(None, pair)), bits)
        for shown, of_row in groupby(at_place, lambda trial: trial.shown):
            blocks.setdefault(place, []).append(_line(table, place, shown, [*of_row], shared, failed))
    return blocks


def _line(table: Table, place: Place, shown: str, trials: list[Trial], shared: Shared, failed: dict[str, str]) -> Line:
    """A row's figures at a place."""
    row = trials[0].row
    line = Line(row, shown, {metric: [] for metric in table.metrics}, report.papers_figure(table, row, place.column, place.bits))
    for trial in trials:
        if row.method == NEAREST:
            metrics = by_cosine(trial.data.root, trial.data.manifest, trial.pair)
        else:
            options = trial.options(shared)
            result, _ = finished_and_cut_off(options)
            if result is None:
                line.failed.append(failed.get(options.storage, "its run is not there"))
                continue
            metrics, line.epochs = result["metrics"], 0 if find_method(row.method).fitted else result["epochs"]
            line.seconds.append(result["seconds"])
            line.notes += result["notes"]
        for metric in table.metrics:
            line.values[metric] += [metrics[metric]] if metric in metrics else []
    return line


def absent(table: Table, found: list[DataSet]) -> list[str]:
    """The paper's columns that no dataset at hand has."""
    there = {report.plain_name(" -> ".join(filter(None, pair))) for data in found for pair in data.pairs(table.alone)}
    columns = dict.fromkeys(column.partition(",")[0] for column in table.columns())
    return [column for column in columns if report.plain_name(column) not in there]
