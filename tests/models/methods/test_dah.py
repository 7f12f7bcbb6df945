"""DAH: its recognition, its terms, its rates."""

import copy
from dataclasses import replace

import pytest
import torch

from models.distributed import BatchNorm
from models.losses.hashing import pairwise_hash_loss
from models.losses.mmd import KERNELS, linear_mmd
from models.methods.dah import DAH, DPSH, DAHConfig, DPSHConfig
from models.registry import METHODS, find_method
from tests.models.players import BITS, CLASSES, PER_CLASS, SHAPE, global_batch

CONFIG = DAHConfig(dropout=0.0, per_class=PER_CLASS, pretrained="none")


def test_our_batch_norm_is_torchs_outside_a_group() -> None:
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm1d(5)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_terms_follow_the_weights() -> None:
    torch.manual_seed(0)
    batch = global_batch(0)
    assert set(DAH(CONFIG, SHAPE, CLASSES, BITS).losses("encoder", batch)) == {"hash", "quantisation", "mmd", "entropy", "pseudo"}
    paper = DAH(DAH.preset("paper"), SHAPE, CLASSES, BITS)
    assert set(paper.losses("encoder", batch)) == {"hash", "quantisation", "mmd", "entropy"}
    assert paper.averaged is None and paper.wants.views == 0
    source_only = DPSH(DPSHConfig(), SHAPE, CLASSES, BITS)
    assert set(source_only.losses("encoder", batch)) == {"hash", "quantisation"}
    assert not source_only.wants.target


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    torch.manual_seed(0)
    method = DAH(CONFIG, SHAPE, CLASSES, BITS).train()
    loss, terms = method.loss("encoder", global_batch(0))
    c = method.config
    weights = {"hash": 1, "quantisation": c.quantisation_weight, "mmd": c.mmd_weight, "entropy": c.entropy_weight, "pseudo": c.pseudo_weight}
    assert loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()), rel=1e-5)


def test_recognition_takes_the_class_of_like_codes() -> None:
    torch.manual_seed(0)
    method = DAH(CONFIG, (1, 16, 16), 2, 8)
    codes = torch.tensor([[1.0] * 8, [1.0] * 7 + [-1.0], [-1.0] * 8])
    method.set_references(codes, torch.tensor([0, 0, 1]))
    assert method.classify_codes(torch.tensor([[0.3] * 8, [-0.2] * 8])).argmax(1).tolist() == [0, 1]


def test_pretrained_layers_learn_at_a_tenth_and_the_rate_falls_to_its_end() -> None:
    method = DAH(replace(DAH.preset("paper"), pretrained="none", network="lenet"), (1, 28, 28), 10, 64)
    group = method.players["encoder"].optimizer.param_groups[1]
    method.begin_step(0.0)
    first = group["lr"]
    method.begin_step(1.0)
    assert group["lr"] == pytest.approx(first / 10)
    network = copy.deepcopy(method.network)
    network.pretrained = True
    assert [g["share"] for g in method._optimizer(network).param_groups] == [0.1, 1.0]


def test_the_registry_names_the_nearest_method() -> None:
    assert METHODS["dah"] is DAH
    with pytest.raises(ValueError, match="did you mean 'dpsh'"):
        find_method("dpsj")


@pytest.mark.parametrize(("per_class", "bits"), [(4, 16), (2, 32)])
def test_the_papers_weights_follow_the_batch_and_the_bits(per_class: int, bits: int) -> None:
    """The loss is eq. 8 with the paper's sums, divided by the images of the batch."""
    torch.manual_seed(0)
    method = DAH(replace(DAH.preset("paper"), per_class=per_class), SHAPE, CLASSES, bits)
    batch = global_batch(0)
    source, target = batch.source._replace(), batch.target._replace()  # type: ignore[union-attr]
    n = CLASSES * per_class
    keep = torch.arange(n)
    batch = type(batch)(source._replace(x=source.x[keep], label=source.label[keep]), target._replace(x=target.x[keep]))
    loss, _ = method.loss("encoder", batch)
    layers, u = method.network(torch.cat([batch.source.x, batch.target.x]))  # type: ignore[union-attr]
    u_s, u_t, labels = u[:n], u[n:], batch.source.label  # type: ignore[union-attr]
    summed = u_s.new_zeros(())
    for i in range(n):
        for j in range(n):
            if i != j:  # without gradient in the program
                like, t = float(labels[i] == labels[j]), u_s[i] @ u_s[j] / 2
                summed = summed - (10.0 if like else 1.0) * (like * t - torch.nn.functional.softplus(t))
    summed = summed + (u - u.sign()).square().sum()
    method.draws = 0
    for layer in [*map(torch.relu, layers[:-1]), layers[-1]]:
        pairs = [part[torch.randperm(n, generator=method.draw())] for part in layer.split(n)]
        summed = summed + 5e3 * linear_mmd(*pairs) * (n // 2)
    similar = (u_t @ u_s.T).exp()
    p = torch.stack([similar[:, labels == c].sum(1) for c in range(CLASSES)], 1) / similar.sum(1, keepdim=True)
    summed = summed - torch.special.xlogy(p, p).sum()
    assert KERNELS == 17 and loss.item() == pytest.approx(summed.item() / (2 * n), rel=1e-4)


def test_the_papers_settings_are_the_papers() -> None:
    paper, digits, dpsh = DAH.preset("paper"), DAH.preset("program-digits"), DPSH.preset("paper")
    assert (paper.per_class, paper.like_weight, paper.learning_rate, paper.final_rate) == (5, 10.0, 1e-4, 0.1) and DAH.presets["paper"].epochs == 300
    assert (digits.per_class, digits.like_weight) == (20, 100.0) and DAH.presets["program-digits"].epochs == 40
    assert dpsh.like_weight == 1.0 and not DPSH(dpsh, SHAPE, CLASSES, BITS).adapts
    with pytest.raises(ValueError, match="dah has no preset 'papers': there are default, paper, program-digits"):
        DAH.preset("papers")


def test_a_pair_of_a_sample_with_itself_can_be_left_out() -> None:
    u, labels = torch.tensor([[1.0, 0.5], [-0.5, 1.0]]), torch.tensor([0, 1])
    between = torch.nn.functional.softplus(u[0] @ u[1] / 2)
    assert pairwise_hash_loss(u, labels, u, labels, 10.0, self_pairs=False).item() == pytest.approx(2 * between.item() / 4)
