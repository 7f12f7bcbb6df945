"""Loss terms against hand-computed values, plain loops and properties."""

import math

import pytest
import torch

from models.losses.alignment import confident_classes, pseudo_label_loss
from models.losses.hashing import class_log_probabilities, entropy_loss, pairwise_hash_loss, quantisation_loss
from models.losses.mmd import _bandwidths, _SummedKernels, linear_mmd, quadratic_mmd
from models.losses.prototypes import kept_relation, label_relation, nearest_prototype, prototype_contrast, renewed_prototypes


def test_pairwise_loss_by_hand() -> None:
    u = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    # logits u.u/2: 1 on the diagonal, 0 elsewhere; like pairs (the diagonal) weigh 3
    expected = (2 * 3 * (math.log(1 + math.e) - 1) + 2 * math.log(2)) / 4
    labels = torch.tensor([0, 1])
    assert pairwise_hash_loss(u, labels, u, labels, 3.0).item() == pytest.approx(expected, rel=1e-6)


def test_pairs_without_a_label_are_left_out() -> None:
    u = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, -1, 0, -1, 1])
    known = labels >= 0
    whole = pairwise_hash_loss(u, labels, u, labels, 2.0)
    assert whole.item() == pytest.approx(pairwise_hash_loss(u[known], labels[known], u[known], labels[known], 2.0).item(), rel=1e-6)
    assert pairwise_hash_loss(u, torch.full((6,), -1), u, labels).item() == 0


def test_quantisation_by_hand() -> None:
    assert quantisation_loss(torch.tensor([[0.5, -1.0]])).item() == pytest.approx(0.125)
    assert quantisation_loss(torch.tensor([[1.0, -1.0]])).item() == 0


def test_class_probabilities_match_the_printed_sum() -> None:
    random = torch.Generator().manual_seed(0)
    queries, codes = torch.randn(4, 8, generator=random), torch.randn(9, 8, generator=random)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    found = class_log_probabilities(queries, codes, labels, 3, scale=0.5).exp()
    for i in range(4):
        sums = [sum(math.exp(0.5 * float(queries[i] @ codes[k])) for k in range(9) if labels[k] == j) for j in range(3)]
        assert found[i].tolist() == pytest.approx([each / sum(sums) for each in sums], rel=1e-5)


def test_class_probabilities_do_not_overflow() -> None:
    queries, codes = torch.ones(1, 128) * 3, torch.cat([torch.ones(1, 128), -torch.ones(1, 128)]) * 3
    found = class_log_probabilities(queries, codes, torch.tensor([0, 1]), 3, scale=1.0)
    assert found[0, 0].item() == pytest.approx(0, abs=1e-6)
    assert found[0, 2].item() == -math.inf


def test_entropy_of_uniform_and_of_certain() -> None:
    assert entropy_loss(torch.full((3, 4), math.log(0.25))).item() == pytest.approx(math.log(4))
    assert entropy_loss(torch.tensor([[0.0, -math.inf]])).item() == 0


def brute_mmd(source: torch.Tensor, target: torch.Tensor) -> float:
    """The unbiased estimate as it is printed, pair by pair."""
    n, both = len(source), torch.cat([source, target])
    distances = torch.tensor([[(a - b).square().sum() for b in both] for a in both])
    off = ~torch.eye(len(both), dtype=torch.bool)
    median = distances[off].median()
    kernel = torch.stack([torch.exp(-distances / (median * 2.0**m)) for m in range(-8, 9)]).mean(0)
    m = len(target)
    ss = sum(kernel[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    tt = sum(kernel[n + i, n + j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    st = sum(kernel[i, n + j] for i in range(n) for j in range(m)) / (n * m)
    return float(ss + tt - 2 * st)


def test_quadratic_mmd_matches_the_sum_over_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    source, target = torch.randn(5, 3, generator=random), torch.randn(6, 3, generator=random) + 1
    assert quadratic_mmd(source, target).item() == pytest.approx(brute_mmd(source, target), rel=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_summed_kernels_are_those_of_autograd_bit_for_bit(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    x, weights = scale * torch.randn(40, 9, generator=random), torch.randn(40, 40, generator=random)
    distances = torch.cdist(x, x).square()
    bandwidths = _bandwidths(distances)
    one, other = (distances.clone().requires_grad_() for _ in range(2))
    made, plain = _SummedKernels.apply(one, bandwidths), sum(torch.exp(-other / bandwidth) for bandwidth in bandwidths)
    assert isinstance(plain, torch.Tensor)
    for each in (made, plain):
        (each * weights).sum().backward()
    assert torch.equal(made, plain) and one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    assert one.grad.count_nonzero() == 40 * 40


@pytest.mark.parametrize(("estimate", "n"), [(linear_mmd, 80_000), (quadratic_mmd, 800)])
def test_mmd_is_about_zero_for_one_distribution_and_grows_with_the_shift(estimate: object, n: int) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 4, generator=random), torch.randn(n, 4, generator=random)
    same, near, far = (float(estimate(a, b + shift)) for shift in (0.0, 0.5, 2.0))  # type: ignore[operator]
    assert abs(same) < 0.005 < near < far


def test_gradients_are_right() -> None:
    random = torch.Generator().manual_seed(0)
    u = torch.randn(6, 8, generator=random, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 8, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: pairwise_hash_loss(x, labels, x, labels, 5.0), u)
    assert torch.autograd.gradcheck(lambda x: entropy_loss(class_log_probabilities(v, x, labels, 3, 0.3)), u)


def test_pseudo_labels_by_hand() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95]]).log()
    assert confident_classes(logits, 0.8).tolist() == [0, -1, 1] and confident_classes(logits, 0.5).tolist() == [0, 1, 1]
    expected = -(math.log(0.9) + math.log(0.95)) / 3  # the sure ones, over all
    assert pseudo_label_loss(logits, torch.tensor([0, -1, 1])).item() == pytest.approx(expected, rel=1e-6)
    assert pseudo_label_loss(logits, torch.full((3,), -1)).item() == 0


def test_prototypes_are_running_means_of_directions_and_their_contrast_is_that_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2, -1, 2, 0])
    memory = torch.nn.functional.normalize(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    memory[2] = 0  # never seen
    found = renewed_prototypes(memory, x, labels)
    for c in range(4):
        rows = x[labels == c]
        wanted = memory[c] + rows.mean(0) / rows.mean(0).norm() if len(rows) else memory[c]
        torch.testing.assert_close(found[c], wanted / wanted.norm())
    cosines = [[float(row @ each / row.norm()) if each.any() else -math.inf for each in memory] for row in x]
    assert nearest_prototype(x, memory).tolist() == [max(range(4), key=row.__getitem__) for row in cosines]
    target, present = torch.nn.functional.normalize(torch.randn(4, 5, generator=generator, dtype=torch.float64)), torch.tensor([True, False, True, True])
    losses = []
    for c in (0, 3):  # 1 is absent, 2 was never seen
        positive = math.exp(float(memory[c] @ target[c]) / 0.5)
        losses.append(-math.log(positive / (positive + sum(math.exp(float(memory[c] @ memory[other]) / 0.5) for other in (0, 1, 3) if other != c))))
    assert prototype_contrast(memory, target, present, 0.5).item() == pytest.approx(sum(losses) / 2)
    assert prototype_contrast(memory, target, torch.zeros(4, dtype=torch.bool), 0.5).item() == 0


def test_relations_are_compared_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    f, g, h, k = (torch.randn(n, w, generator=generator, dtype=torch.float64) for n, w in ((4, 6), (3, 6), (4, 8), (3, 8)))
    labels = torch.tensor([0, 1, 0, 2])

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    like = [(min(max(cosine(h[i], h[j]), 0), 1) - 1.1 * float(labels[i] == labels[j])) ** 2 for i in range(4) for j in range(4)]
    assert label_relation(h, labels, 1.1).item() == pytest.approx(sum(like) / 16)
    unlabelled = torch.cat([h, k[:, :8]]), torch.cat([labels, torch.full((3,), -1)])
    assert label_relation(*unlabelled, 1.1).item() == pytest.approx(sum(like) / 16)
    assert label_relation(h, torch.full((4,), -1), 1.1).item() == 0
    kept = [(cosine(f[i], g[j]) - cosine(h[i], k[j])) ** 2 for i in range(4) for j in range(3)]
    assert kept_relation(f, g, h, k).item() == pytest.approx(sum(kept) / 12)
