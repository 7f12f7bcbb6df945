"""The maps of TCA, JDA, GFK and CORAL, compared with their papers' matrices written out."""

import numpy as np
import pytest

from models.components import fit_components
from models.subspaces import flow_axes, joint_axes, nearest_neighbour, recolouring, transfer_axes

CLASSES = 3


@pytest.fixture
def domains() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows and classes of two domains; a class of the second lies where another of the first does."""
    draw = np.random.default_rng(0)
    labels, guesses = np.arange(30) % CLASSES, np.arange(21) % CLASSES
    centres = 3 * draw.normal(size=(CLASSES, 6))
    return centres[labels] + draw.normal(size=(30, 6)), centres[guesses] + draw.normal(size=(21, 6)) + centres[1] - centres[0], labels, guesses


@pytest.mark.parametrize("joint", [False, True])
def test_transfer_axes_solve_the_papers_eigenproblem(joint: bool, domains: tuple[np.ndarray, ...]) -> None:
    """``(X M X' + ridge I) A = X H X' A Phi`` with M of the means' outer products, of the smallest Phi."""
    source, target, labels, guesses = domains
    n, m = len(source), len(target)
    e = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])
    matrix = np.outer(e, e) * (CLASSES if joint else 1)
    for c in range(CLASSES if joint else 0):
        e = np.concatenate([(labels == c) / (labels == c).sum(), -1.0 * (guesses == c) / (guesses == c).sum()])
        matrix += np.outer(e, e)
    matrix /= np.linalg.norm(matrix)
    x = np.concatenate([source, target]).T
    left, right = x @ matrix @ x.T + 0.5 * np.eye(6), x @ (np.eye(n + m) - 1 / (n + m)) @ x.T
    given = {"labels": labels, "guesses": guesses, "classes": CLASSES} if joint else {}
    axes = transfer_axes(source, target, 4, 0.5, **given).T
    phi = np.linalg.lstsq(right @ axes, left @ axes, rcond=None)[0]
    assert np.allclose(left @ axes, right @ axes @ phi) and np.allclose(phi, np.diag(np.diag(phi)), atol=1e-9)
    assert np.allclose(np.diag(phi), np.sort(np.linalg.eigvals(np.linalg.solve(right, left)).real)[:4])


def test_joint_axes_bring_the_classes_together(domains: tuple[np.ndarray, ...]) -> None:
    """The shift between the domains is nearly gone, and a nearest neighbour of the source tells the classes of most target rows."""
    source, target, labels, classes = domains
    axes = joint_axes(source, target, labels, CLASSES, 2, 0.1, 5)
    found = nearest_neighbour(target @ axes.T, source @ axes.T, labels)
    assert (found == classes).mean() > 0.75 and (nearest_neighbour(target, source, labels) == classes).mean() < 0.7  # one class of three is taken for another


def test_flow_axes_are_a_root_of_the_kernel(domains: tuple[np.ndarray, ...]) -> None:
    """G is the integral of the projections on the subspaces of the geodesic, summed here over 2,000 of them."""
    source, target, *_ = domains
    axes = flow_axes(source, target, 2)
    one, other = (fit_components(x, 2).components_.T for x in (source, target))
    left, cosine, right = np.linalg.svd(one.T @ other)
    theta = np.arccos(cosine)
    start = one @ left
    away = (other @ right.T - start * cosine) / np.sin(theta)
    points = [start * np.cos(t * theta) + away * np.sin(t * theta) for t in (np.arange(2000) + 0.5) / 2000]
    assert np.allclose(points[-1] @ points[-1].T, other @ other.T, atol=1e-2)
    assert np.allclose(axes.T @ axes, np.mean([phi @ phi.T for phi in points], 0), atol=1e-6)


def test_recoloured_rows_have_the_targets_covariance(domains: tuple[np.ndarray, ...]) -> None:
    source, target, *_ = domains
    moved = (source - source.mean(0)) @ recolouring(source, target, 1e-9).T
    assert np.allclose(np.cov(moved.T), np.cov(target.T), atol=1e-6)
