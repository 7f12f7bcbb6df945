"""Linear maps that bring two domains' features together: TCA, JDA, the geodesic flow kernel and correlation alignment."""

import numpy as np
import torch

from models.components import fit_components


def _symmetric(x: np.ndarray, power: float) -> np.ndarray:
    """A power of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(x)
    return (vectors * values**power) @ vectors.T


def _class_means(x: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each class (classes, features), and the classes' sizes (classes,)."""
    member = np.eye(classes)[labels]
    sizes = member.sum(0)
    return (member.T @ x) / np.maximum(sizes, 1)[:, None], sizes


def transfer_axes(source: np.ndarray, target: np.ndarray, width: int, ridge: float, labels: np.ndarray | None = None, guesses: np.ndarray | None = None,
                  classes: int = 0) -> np.ndarray:  # fmt: skip
    """Axes on which the domains' means are near and the variance is large: TCA with a linear kernel, or JDA's step (Long et al., ICCV 2013).

    They solve ``(X M X' + ridge I) a = X H X' a phi`` for the smallest phi. M is JDA's sum of the outer products of the domains' means, and of the means of
    each class if there are labels, divided by its Frobenius norm; H centres.

    Args:
        source, target: (n, features) and (m, features).
        width: number of axes.
        ridge: lambda.
        labels, guesses: (n,) and (m,), classes of the source and guessed ones of the target; None for TCA.

    Returns:
        (width, features).
    """
    from scipy.linalg import eigh  # noqa: PLC0415  slow to import

    n, m = len(source), len(target)
    gaps, weight = [source.mean(0) - target.mean(0)], [1 / n + 1 / m]
    shared = 0.0  # sum of the squared products of the first column of M's root with the others
    if labels is not None and guesses is not None:
        (of_source, sizes), (of_target, guessed) = _class_means(source, labels, classes), _class_means(target, guesses, classes)
        for each in np.flatnonzero((sizes > 0) & (guessed > 0)):
            gaps.append(of_source[each] - of_target[each])
            weight.append(1 / sizes[each] + 1 / guessed[each])
            shared += 2 * classes * (1 / n + 1 / m) ** 2
    root = np.stack(gaps)
    scale = np.ones(len(gaps))
    scale[0] = max(classes, 1)  # JDA counts the domains' means once for each class
    norm = np.sqrt((scale**2 * np.square(weight)).sum() + shared)
    discrepancy = (root.T * scale) @ root / norm
    both = np.concatenate([source, target])
    centred = both - both.mean(0)
    d = discrepancy.shape[0]
    _, axes = eigh(centred.T @ centred, discrepancy + ridge * np.eye(d), subset_by_index=(d - min(width, d), d - 1))
    return np.ascontiguousarray(axes[:, ::-1].T)


def nearest_neighbour(queries: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label of the nearest row of each query, by Euclidean distance: (m,)."""
    found, held = [], torch.from_numpy(rows)
    for part in torch.from_numpy(queries).split(1024):
        found.append(torch.cdist(part, held).argmin(1))
    return np.asarray(labels[torch.cat(found).numpy()])


def joint_axes(source: np.ndarray, target: np.ndarray, labels: np.ndarray, classes: int, width: int, ridge: float, rounds: int) -> np.ndarray:
    """JDA's axes (width, features): TCA's, then rounds with the target's classes guessed by the nearest source row on the axes."""
    axes = transfer_axes(source, target, width, ridge)
    for _ in range(rounds):
        guesses = nearest_neighbour(target @ axes.T, source @ axes.T, labels)
        axes = transfer_axes(source, target, width, ridge, labels, guesses, classes)
    return axes


def flow_axes(source: np.ndarray, target: np.ndarray, width: int) -> np.ndarray:
    """A root of the geodesic flow kernel: axes A (2 width, features) with A'A = G (Gong et al., CVPR 2012).

    G integrates the projections on all subspaces between the domains' principal subspaces of ``width`` axes.
    """
    one, other = (fit_components(x, width).components_.astype(np.float64).T for x in (source, target))
    left, cosine, right = np.linalg.svd(one.T @ other)
    theta = np.arccos(np.clip(cosine, -1, 1))
    start = one @ left
    away = start * cosine - other @ right.T  # the complement's part, of length sin theta
    away /= np.maximum(np.linalg.norm(away, axis=0), 1e-12)
    twice = np.maximum(2 * theta, 1e-9)
    sine, rest = np.sin(twice) / twice, (np.cos(twice) - 1) / twice
    blocks = np.stack([np.stack([1 + sine, rest], 1), np.stack([rest, 1 - sine], 1)], 1) / 2  # (width, 2, 2)
    values, vectors = np.linalg.eigh(blocks)
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]  # block = root root'
    pair = np.stack([start, away], 2)  # (features, width, 2)
    return np.einsum("fwi,wij->wjf", pair, roots).reshape(-1, source.shape[1])


def recolouring(source: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """CORAL: the map A (features, features) that gives centred source rows the target's covariance, x A' (Sun et al., AAAI 2016).

    Args:
        ridge: added to the diagonals of both covariances; 1 in the paper.
    """
    eye = ridge * np.eye(source.shape[1])
    whitened, coloured = _symmetric(np.cov(source.T) + eye, -0.5), _symmetric(np.cov(target.T) + eye, 0.5)
    return np.asarray((whitened @ coloured).T)
