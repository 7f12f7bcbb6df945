"""Plots of an evaluation: precision-recall curve, t-SNE of codes, and retrievals with right and wrong answers framed."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgba

from data.decoding import read_pictures
from data.filesystem import atomic_write
from data.manifest import Manifest
from pipelines.retrieval.metrics import Encoded, distance_histograms, precision_recall

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RIGHT, WRONG = "#1a9850", "#d73027"


def draw_all(query: Encoded, database: Encoded, root: Path, manifest: Manifest, out: Path) -> None:
    """Draw all plots that the query and database sets allow, into a folder; reads only the images that it shows."""
    if (query.labels >= 0).any():
        pr_curve(query, database, out / "precision_recall.png")
    code_map(query, database, manifest.classes, out / "codes_tsne.png")
    if manifest.store != "feature":
        retrieval_grid(query, database, root, manifest, out / "retrievals.png")


def pr_curve(query: Encoded, database: Encoded, path: Path) -> None:
    """Precision against recall within each Hamming radius."""
    precision, recall = precision_recall(distance_histograms(query.codes, query.labels, database.codes, database.labels))
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.plot(recall, precision, marker=".")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.set_title(f"{query.name} in {database.name}, Hamming radius 0 to {query.codes.shape[1] * 8}", fontsize=9)
    axes.grid(alpha=0.3)
    save(figure, path)


def code_map(query: Encoded, database: Encoded, classes: list[str], path: Path, most: int = 600, seed: int = 0) -> None:
    """t-SNE of codes, coloured by class, with one marker per domain."""
    random = np.random.default_rng(seed)
    chosen = [random.permutation(len(part.codes))[:most] for part in (database, query)]
    bits, labels = (np.concatenate([each[rows] for each, rows in zip(parts, chosen, strict=True)]) for parts in (
        (as_bits(database.codes), as_bits(query.codes)), (database.labels, query.labels),
    ))  # fmt: skip
    if len(bits) < 10:
        return
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    scatter(axes, embedded_in_plane(bits, seed), labels, np.repeat([0, 1], [len(rows) for rows in chosen]), classes, [database.name, query.name])
    axes.set_title("t-SNE of the codes: colour is the class, mark the domain", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, path)


def as_bits(codes: np.ndarray) -> np.ndarray:
    """Packed codes as float32 bits, 0 or 1."""
    return np.unpackbits(codes, axis=1).astype(np.float32)


def embedded_in_plane(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of rows: (n, width) -> (n, 2)."""
    from sklearn.manifold import TSNE  # noqa: PLC0415

    x = x + np.random.default_rng(seed).normal(0, 1e-3, x.shape)  # otherwise equal codes would coincide
    found: np.ndarray = TSNE(perplexity=min(30, len(x) // 4), init="pca", random_state=seed, max_iter=500).fit_transform(x.astype(np.float32))
    return found


def scatter(axes: plt.Axes, place: np.ndarray, labels: np.ndarray, domain: np.ndarray, classes: list[str], names: list[str]) -> None:
    """Draw points (n, 2): the colour is the class, grey if unknown, and the mark the domain, by its number in ``names``."""
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "nipy_spectral")
    for each, (name, mark) in enumerate(zip(names, "o^", strict=False)):
        own = domain == each
        shades = colours(labels[own] % 10 if len(classes) <= 10 else labels[own] / len(classes))
        shades[labels[own] < 0] = to_rgba("grey")
        axes.scatter(place[own, 0], place[own, 1], c=shades, marker=mark, s=12, alpha=0.7, linewidths=0, label=name)
    if len(classes) <= 10:
        for label, name in enumerate(classes):
            axes.scatter([], [], color=colours(label), marker="s", label=name)
    axes.set_xticks([])
    axes.set_yticks([])


def picture(x: np.ndarray) -> np.ndarray:
    """Convert a stored image (channels, h, w) uint8 to matplotlib's layout."""
    return np.repeat(x, 3, 0).transpose(1, 2, 0) if x.shape[0] == 1 else x.transpose(1, 2, 0)


def retrieval_grid(
    query: Encoded, database: Encoded, root: Path, manifest: Manifest, path: Path, rows: int = 10, neighbours: int = 10
) -> None:  # fmt: skip
    """One query of each class with its nearest database images, framed green if right and red if wrong.

    The queries are the first of each class in the split's (shuffled) order, or the first of all without labels; none is selected
    by its result.
    """
    labels = np.unique(query.labels[query.labels >= 0])[:rows]
    chosen = [int(np.flatnonzero(query.labels == label)[0]) for label in labels] or list(range(min(rows, len(query.labels))))
    bits = np.unpackbits(database.codes, axis=1).astype(np.float32) * 2 - 1
    wanted = np.unpackbits(query.codes[chosen], axis=1).astype(np.float32) * 2 - 1
    nearest = np.argsort(-(wanted @ bits.T), axis=1, kind="stable")[:, :neighbours]
    asked = read_pictures(root, manifest, query.name, chosen)
    answers = read_pictures(root, manifest, database.name, nearest.flatten().tolist())
    grid(
        [picture(asked[q]) for q in chosen],
        [[picture(answers[int(n)]) for n in row] for row in nearest],
        [[bool(database.labels[n] == query.labels[q]) if query.labels[q] >= 0 else None for n in row] for q, row in zip(chosen, nearest, strict=True)],
        f"{query.name}  →  {database.name}",
        path,
    )


def grid(queries: list[np.ndarray], answers: list[list[np.ndarray]], right: list[list[bool | None]], title: str, path: Path) -> None:
    """Draw each query on the left with its answers in a row; frames are green, red, or grey if unknown."""
    columns = max(map(len, answers)) + 1
    figure, axes = plt.subplots(len(queries), columns, figsize=(0.62 * columns + 0.3, 0.62 * len(queries) + 0.4), squeeze=False, layout="constrained")
    for r, image in enumerate(queries):
        for c, cell in enumerate(axes[r]):
            cell.set_xticks([])
            cell.set_yticks([])
            known = right[r][c - 1] if 0 < c <= len(answers[r]) else None
            colour = "black" if c == 0 else "grey" if known is None else RIGHT if known else WRONG
            if c > len(answers[r]):
                cell.axis("off")
                continue
            cell.imshow(image if c == 0 else answers[r][c - 1])
            for side in cell.spines.values():
                side.set(color=colour, linewidth=1.0 if c == 0 else 2.5)
    axes[0][0].set_title("query", fontsize=7)
    figure.suptitle(title, fontsize=8)
    save(figure, path)


def pairs_grid(rows: list[list[tuple[np.ndarray, np.ndarray]]], title: str, path: Path, most: int = 8) -> None:
    """Draw pairs of stored images (channels, h, w) side by side, the original on the left; at most ``most`` pairs per row."""
    height, width = rows[0][0][0].shape[1:]
    gap = max(2, width // 8)
    columns = min(most, max(map(len, rows)))
    sheet = np.full((len(rows) * (height + 2), columns * (2 * width + 1 + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pair in enumerate(row[:most]):
            top, left = r * (height + 2), c * (2 * width + 1 + gap)
            for i, image in enumerate(pair):
                sheet[top : top + height, left + i * (width + 1) : left + i * (width + 1) + width] = picture(image)
    figure, axes = plt.subplots(figsize=(sheet.shape[1] / 55, sheet.shape[0] / 55 + 0.3), layout="constrained")
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    axes.set_title(f"{title} (pairs: original, made)", fontsize=8)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)
