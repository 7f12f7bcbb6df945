"""The papers' figures, drawn from the runs of a table's first seed: precision-recall curves, t-SNE before and after, matching costs, retrievals."""

from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np

from data.filesystem import to_path
from data.manifest import Manifest
from pipelines.reproduction.cosine import unit_rows
from pipelines.reproduction.reuse import finished_and_cut_off
from pipelines.reproduction.tables import NEAREST, Table
from pipelines.reproduction.trials import Shared, Trial
from pipelines.retrieval import evaluation, plots
from pipelines.retrieval.metrics import Encoded, distance_histograms, precision_recall
from pipelines.training import runs
from pipelines.training.restore import load_method

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SAMPLE = 500  # rows of a domain in a t-SNE


def draw(table: Table, plan: list[Trial], shared: Shared, out: Path) -> None:
    """Draw a folder of pictures for each direction and code length, of the runs of the default preset and the first seed."""
    first = [trial for trial in plan if trial.seed == plan[0].seed and trial.preset == "default" and trial.row.method != NEAREST]
    for (data, pair, bits), at_place in groupby(first, lambda trial: (trial.data, trial.pair, trial.bits)):
        folder = out / f"{data.name} {' '.join(filter(None, pair))} {bits}".replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        _draw_place(table, [*at_place], shared, folder)


def _draw_place(table: Table, trials: list[Trial], shared: Shared, folder: Path) -> None:
    root, manifest, (source, target) = trials[0].data.root, trials[0].data.manifest, trials[0].pair
    protocol = "target" if table.alone else "cross"
    query, database = evaluation.protocol_splits(manifest, source, target, protocol)
    curves, costs = dict[str, tuple[np.ndarray, np.ndarray]](), dict[str, list[float]]()
    scored: list[tuple[float, Trial, tuple[Encoded, Encoded]]] = []
    for trial in trials:
        options = trial.options(shared)
        result, _ = finished_and_cut_off(options)
        if result is None:
            continue
        run = to_path(options.storage) / result["run_id"]
        encode = evaluation.MethodEncoder(load_method(run, manifest))
        codes = evaluation.encode_split(encode, root, manifest, query), evaluation.encode_split(encode, root, manifest, database)
        if (codes[0].labels >= 0).any():  # a target may have none
            found = distance_histograms(codes[0].codes, codes[0].labels, codes[1].codes, codes[1].labels, own=query == database)
            curves[trial.shown] = precision_recall(found)
        cost = [record["terms"]["matching"] for record in runs.read_progress(run) if "matching" in record["terms"]]
        costs |= {trial.shown: cost} if cost and table.alone else {}
        if not trial.row.oracle:
            scored.append((result["metrics"].get(f"{protocol}/map", 0.0), trial, codes))
    if not scored:
        return
    _lines({name: (recall, precision) for name, (precision, recall) in curves.items()}, ("recall", "precision"), folder / "precision_recall.png")
    _lines({name: (np.arange(1, len(cost) + 1), np.array(cost)) for name, cost in costs.items()}, ("epoch", "matching cost"), folder / "matching.png")
    own = max((each for each in scored if each[1].row.own), key=lambda one: one[0], default=None)
    others = max((each for each in scored if not each[1].row.own), key=lambda one: one[0], default=None)
    before_and_after(root, manifest, query, database, own or scored[0], folder / "tsne.png")
    images = _images(root, manifest)
    for name, best in (("ours", own), ("baseline", others)):
        if best and images and query != database:
            shown = f"retrievals-{name}-{best[1].shown}.png".replace(" ", "-").replace("/", "-")
            plots.retrieval_grid(*best[2], *images, folder / shown)


def _images(root: Path, manifest: Manifest) -> tuple[Path, Manifest] | None:
    """The dataset of the images: this one, or the one that was embedded, whose rows are in the same order, if it is still there as it was."""
    if manifest.store != "feature":
        return root, manifest
    embedded = manifest.embedding
    if not embedded or not (to_path(embedded.images) / "manifest.json").is_file():
        return None
    images = Manifest.read(to_path(embedded.images))
    return (to_path(embedded.images), images) if images.digest() == embedded.digest else None


def _lines(curves: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, str], path: Path) -> None:
    """Draw a curve for each row; nothing without curves."""
    if not curves:
        return
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    colours = plt.get_cmap("tab20")
    for place, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, label=name, color=colours(place % 20), linewidth=1.2, linestyle="-" if place < 20 else "--")
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plots.save(figure, path)


def before_and_after(
    root: Path, manifest: Manifest, query: str, database: str, best: tuple[float, Trial, tuple[Encoded, Encoded]], path: Path
) -> None:  # fmt: skip
    """t-SNE of what the method takes (pixels or features) and of its codes, of the same rows: colour is the class, the mark the domain."""
    names = dict.fromkeys((database, query))
    raw = [evaluation.encode_split(unit_rows, root, manifest, name) for name in names]
    after = {each.name: each for each in best[2]}
    places = [np.linspace(0, len(each.labels) - 1, min(SAMPLE, len(each.labels))).astype(int) for each in raw]
    left = np.concatenate([each.codes[chosen] for each, chosen in zip(raw, places, strict=True)])
    right = np.concatenate([plots.as_bits(after[name].codes[chosen]) for name, chosen in zip(names, places, strict=True)])
    labels = np.concatenate([each.labels[chosen] for each, chosen in zip(raw, places, strict=True)])
    domain = np.repeat(np.arange(len(places)), [len(chosen) for chosen in places])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for cell, x, title in zip(axes, (left, right), ("what the method takes", f"codes of {best[1].shown}"), strict=True):
        plots.scatter(cell, plots.embedded_in_plane(x), labels, domain, manifest.classes, [*names])
        cell.set_title(title, fontsize=9)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plots.save(figure, path)
