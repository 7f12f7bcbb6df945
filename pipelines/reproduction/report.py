"""What ``hashbridge reproduce`` prints and writes: our figures beside the papers', as Markdown, CSV and pictures."""

import csv
import io
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from data.filesystem import write_text
from pipelines.reproduction.tables import Row, Table
from pipelines.reproduction.trials import DataSet
from pipelines.retrieval.plots import save

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OWN, BASELINE, ORACLE = "#2166ac", "#b2b2b2", "#d6c28a"


class Place(NamedTuple):
    """Where a block's rows are compared: a dataset, a direction ("mean" of all), a code length."""

    data: DataSet
    column: str
    bits: int


@dataclass
class Line:
    """A row's figures at a place.

    Attributes:
        values: by metric, a value for each seed.
        paper: the paper's figure in percent, of the table's first metric.
        epochs, seconds: of a run; of fitted rows, one epoch.
        failed: messages of the runs that failed.
        notes: of the runs' evaluation, such as rows that a metric leaves out.
    """

    row: Row
    shown: str
    values: dict[str, list[float]]
    paper: float | None = None
    epochs: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mean(self, metric: str) -> float | None:
        """The mean over the seeds, None if there is no value."""
        return statistics.mean(self.values[metric]) if self.values.get(metric) else None


Blocks = dict[Place, list[Line]]


def plain_name(name: str) -> str:
    """A domain's or direction's name as the papers' tables spell it here: lower case, with spaces."""
    return " -> ".join(" ".join(re.split(r"[ _-]+", part.strip().lower())) for part in name.split("->"))


def papers_figure(table: Table, row: Row, column: str, bits: int) -> float | None:
    """The paper's figure of a row in a column."""
    found = {plain_name(name): value for name, value in row.figures.items()}
    return found.get(plain_name(f"{column}, {bits} bits"), found.get(plain_name(column)))


def with_means(blocks: Blocks, table: Table) -> Blocks:
    """The blocks, and for each dataset and code length the mean over its directions, of rows that have all of them."""
    means: Blocks = {}
    for data, bits in dict.fromkeys((place.data.name, place.bits) for place in blocks):
        parts = [lines for place, lines in blocks.items() if (place.data.name, place.bits) == (data, bits)]
        place = next(place for place in blocks if (place.data.name, place.bits) == (data, bits))
        if len(parts) < 2:
            continue
        for lines in zip(*parts, strict=True):
            values = {metric: _across([line.values.get(metric, []) for line in lines]) for metric in table.metrics}
            mean = Line(lines[0].row, lines[0].shown, values, papers_figure(table, lines[0].row, "mean", bits), lines[0].epochs)
            mean.seconds = [statistics.mean(line.seconds) for line in lines if line.seconds]
            means.setdefault(Place(place.data, f"mean of {len(parts)}", bits), []).append(mean)
    return blocks | means


def _across(columns: list[list[float]]) -> list[float]:
    """The mean over the directions for each seed; empty if a direction lacks one."""
    return [statistics.mean(each) for each in zip(*columns, strict=True)] if len({*map(len, columns)}) == 1 else []


def verdict(table: Table, lines: list[Line]) -> str:
    """Whether the best of our systems is ahead of the best row that they are compared with."""
    metric = table.metrics[0]
    scored = [(line.mean(metric), line) for line in lines if line.mean(metric) is not None and not line.row.oracle]
    own, others = ([each for each in scored if each[1].row.own == which] for which in (True, False))
    if not own or not others:
        return ""
    (best, ours), (rival, theirs) = (max(each, key=lambda one: one[0] or 0.0) for each in (own, others))
    assert best is not None and rival is not None
    told = "ahead of" if best > rival else "behind" if best < rival else "level with"
    return f"{metric}: {ours.shown} {100 * best:.1f} is {told} the best baseline, {theirs.shown} {100 * rival:.1f}."


def _cell(values: list[float]) -> str:
    """Mean in percent, and the deviation over the seeds if there are several."""
    spread = f" ±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else ""


def markdown(paper: str, table: Table, blocks: Blocks, seeds: list[int], absent: list[str]) -> str:
    """A table as Markdown: a block for each direction of each dataset."""
    title = f"## {paper}, table {table.number}: {table.title}" if table.number else f"## {table.title}"
    of_paper = f"The paper's data: {table.data}. " if table.number else ""
    text = [title, "", f"{of_paper}All figures are percent, of the last epoch: no epoch is chosen by target labels.", ""]
    for place, lines in blocks.items():
        text += [f"**{place.column}**, {place.bits} bits, seeds {', '.join(map(str, seeds))}; {place.data.described()}", ""]
        text += ["| | the paper's | " + " | ".join(table.metrics) + " | epochs | seconds |", "|---" * (len(table.metrics) + 4) + "|"]
        best = max((line.mean(table.metrics[0]) or 0.0 for line in lines if not line.row.oracle), default=0.0)
        for line in lines:
            cells = [_cell(line.values.get(metric, [])) for metric in table.metrics]
            if line.mean(table.metrics[0]) == best and not line.row.oracle:
                cells[0] = f"**{cells[0]}**"
            name = f"**{line.shown}**" if line.row.own else line.shown
            failed = f" ({len(line.failed)} failed: {line.failed[0]})" if line.failed else ""
            seconds = f"{statistics.mean(line.seconds):.0f}" if line.seconds else ""
            figure = "" if line.paper is None else f"{line.paper:.1f}"
            text.append(f"| {name}{failed} | {figure} | " + " | ".join(cells) + f" | {line.epochs or ''} | {seconds} |")
        text += ["", verdict(table, lines), "", *_noted(lines)]
    if absent:
        text += [f"Not at hand: {', '.join(absent)}. `hashbridge datasets` says which data have these domains.", ""]
    if table.missing:
        text += [f"Rows of the paper that are not here: {table.missing}.", ""]
    return "\n".join(text)


def _noted(lines: list[Line]) -> list[str]:
    """The notes of the lines' runs, each once with the rows that it is of; "all rows" if it is of all that have runs."""
    shown: dict[str, list[str]] = {}
    for line in lines:
        for note in dict.fromkeys(line.notes):
            shown.setdefault(note, []).append(line.shown)
    trained = [line for line in lines if line.seconds]
    return [f"Note ({'all rows' if len(rows) == len(trained) else ', '.join(rows)}): {note}\n" for note, rows in shown.items()]


def rows_of(paper: str, table: Table, blocks: Blocks) -> list[dict[str, Any]]:
    """A table as flat records, one for each metric of each row."""
    records = []
    for place, lines in blocks.items():
        for line, metric in ((line, metric) for line in lines for metric in table.metrics):
            values = line.values.get(metric, [])
            records.append({
                "paper": paper, "table": table.number, "data": place.data.name, "column": place.column, "bits": place.bits, "row": line.shown,
                "method": line.row.method or "features", "own": line.row.own, "oracle": line.row.oracle, "metric": metric, "seeds": len(values),
                "mean": statistics.mean(values) if values else None, "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "paper_figure": line.paper / 100 if line.paper is not None and metric == table.metrics[0] else None, "epochs": line.epochs,
                "seconds": statistics.mean(line.seconds) if line.seconds else None, "failed": len(line.failed),
            })  # fmt: skip
    return records


def write_csv(records: list[dict[str, Any]], path: Path) -> None:
    """Write records as CSV, shares of one in place of percent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*records[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def bars(paper: str, table: Table, blocks: Blocks, path: Path) -> None:
    """Draw the first metric of each row, a panel for each direction: our systems blue, baselines grey, oracles sand; a diamond is the paper's figure."""
    metric, panels = table.metrics[0], [(place, lines) for place, lines in blocks.items() if any(line.mean(table.metrics[0]) is not None for line in lines)]
    if not panels:
        return
    columns = min(3, len(panels))
    down = -(-len(panels) // columns)
    height = 0.24 * max(len(lines) for _, lines in panels) + 0.8
    figure, axes = plt.subplots(down, columns, figsize=(4.6 * columns, height * down), squeeze=False, layout="constrained")
    for cell in axes.flat[len(panels) :]:
        cell.axis("off")
    for cell, (place, lines) in zip(axes.flat, panels, strict=False):
        shown = [line for line in lines if line.mean(metric) is not None][::-1]
        colours = [OWN if line.row.own else ORACLE if line.row.oracle else BASELINE for line in shown]
        spread = [100 * statistics.stdev(line.values[metric]) if len(line.values[metric]) > 1 else 0.0 for line in shown]
        cell.barh(range(len(shown)), [100 * (line.mean(metric) or 0.0) for line in shown], xerr=spread, color=colours, error_kw={"lw": 0.8})
        known = [(place_, line.paper) for place_, line in enumerate(shown) if line.paper is not None]
        cell.plot([value for _, value in known], [place_ for place_, _ in known], "D", color="black", markersize=4, linestyle="none")
        cell.set_yticks(range(len(shown)), [line.shown for line in shown], fontsize=7)
        cell.set_xlim(0, 100)
        cell.set_title(f"{place.column}, {place.bits} bits ({place.data.name})", fontsize=8)
        cell.tick_params(axis="x", labelsize=7)
    figure.suptitle(f"{paper}, table {table.number}: {metric} in percent" if table.number else f"{metric} in percent", fontsize=9)
    figure.supxlabel("blue: hashbridge's systems; grey: baselines; sand: oracle; diamond: the paper's figure, on its data", fontsize=7)
    save(figure, path)
