"""The losses of the tables' rows, compared with hand-computed values and brute force."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.losses.contrastive import matching_entropy, prototype_loss
from models.losses.domains import domain_loss, moved_centroids, multilinear, reversed_gradient
from models.losses.hashing import structure_loss


def drawn(*shape: int) -> Tensor:
    """Unit rows in double precision."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64))


def test_a_reversed_gradient_is_the_negative_one() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (reversed_gradient(x, 0.5) * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [-1.5, -2.0]


def test_domain_loss_is_a_mean_over_each_domain() -> None:
    assert domain_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(math.log(2))
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([-1.0])
    assert domain_loss(one, other).item() == pytest.approx((math.log1p(math.exp(-2)) / 2 + math.log(2) / 2 + math.log1p(math.exp(-1))) / 2)


def test_multilinear_is_each_samples_outer_product() -> None:
    u, p = drawn(4, 3), drawn(4, 2)
    assert multilinear(u, p).equal(torch.stack([torch.outer(one, other).flatten() for one, other in zip(u, p, strict=True)]))


def test_centroids_move_towards_the_batch() -> None:
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[3.0, 1.0], [5.0, 3.0]], requires_grad=True)
    moved = moved_centroids(memory, x, torch.tensor([0, 0]), 0.75)
    assert moved.tolist() == [[1.75, 0.5], [0.0, 1.0]]  # 3/4 of (1, 0) and 1/4 of (4, 2); the second class has no samples
    moved.sum().backward()
    assert x.grad is not None and (x.grad == 0.125).all()


def test_structure_loss_counts_guessed_pairs_alone() -> None:
    codes = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert structure_loss(codes, torch.tensor([[1.0, -1.0], [-1.0, 0.0]])).item() == pytest.approx(2 * 1.0 / 4)  # (0 - -1)^2 twice; the fourth pair is left out


def test_prototypes_have_temperatures_of_their_own() -> None:
    x, prototypes, phi = drawn(5, 4), drawn(3, 4), torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    member = torch.tensor([0, 2, 1, 1, 0])
    brute = []
    for query, own in zip(x, member.tolist(), strict=True):
        scores = [math.exp(float(query @ c) / t) for c, t in zip(prototypes, phi.tolist(), strict=True)]
        brute.append(-math.log(scores[own] / sum(scores)))
    assert prototype_loss(x, prototypes, member, phi).item() == pytest.approx(sum(brute) / 5)


def test_matching_entropy_is_the_entropy_of_the_similarities() -> None:
    x, slots = drawn(5, 4), drawn(7, 4)
    p = (x @ slots.T / 0.1).softmax(1)
    assert matching_entropy(x, slots, 0.1).item() == pytest.approx(float(-(p * p.log()).sum(1).mean()))
