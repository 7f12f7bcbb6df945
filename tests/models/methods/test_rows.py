"""The tables' rows: what each adds to the networks that it shares with others."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from models.distributed import drawn_bits
from models.itq import fit_itq
from models.memory_bank import MemoryBank
from models.methods.binary_autoencoders import BA, best_codes, linear_decoder
from models.methods.classic import Classic
from models.methods.instance_contrast import ConcentratedBank, cluster_together
from models.methods.ssdh import half_gaussians
from tests.models.players import build, domain_batch, global_batch

ROWS, FEATURES, BITS = 300, 12, 8


def vectors() -> Tensor:
    """Rows around six centres."""
    draw = torch.Generator().manual_seed(0)
    return 2 * torch.randn(6, FEATURES, generator=draw).repeat(ROWS // 6, 1) + torch.randn(ROWS, FEATURES, generator=draw)


def error(x: Tensor, codes: Tensor) -> float:
    """Squared error of the best linear reconstruction from codes, a vector's mean."""
    weights, bias = linear_decoder(codes, x)
    return float((codes @ weights + bias - x).square().sum(1).mean())


def test_the_linear_decoder_is_least_squares() -> None:
    x, codes = vectors(), (vectors()[:, :BITS] > 0).float()
    weights, bias = linear_decoder(codes, x)
    wanted = torch.linalg.lstsq(torch.cat([codes, torch.ones(ROWS, 1)], 1), x).solution
    assert torch.allclose(torch.cat([weights, bias.unsqueeze(0)]), wanted, atol=0.05)  # it has a small ridge


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0)])
def test_codes_cannot_be_made_better_by_one_bit(values: tuple[float, float]) -> None:
    """And their mean error is near that of the best of all 2^L codes."""
    x, draw = vectors(), torch.Generator().manual_seed(1)
    weights, bias, wanted = torch.randn(BITS, FEATURES, generator=draw), x.mean(0), torch.full((ROWS, BITS), values[0])
    start = torch.tensor(values)[torch.randint(2, (ROWS, BITS), generator=draw)]

    def cost(codes: Tensor) -> Tensor:
        return (x - codes @ weights - bias).square().sum(1) + 0.5 * (codes - wanted).square().sum(1)

    found = best_codes(x, start, weights, bias, wanted, 0.5, values)
    for bit in range(BITS):
        flipped = found.clone()
        flipped[:, bit] = values[0] + values[1] - flipped[:, bit]
        assert (cost(flipped) >= cost(found) - 1e-4).all()
    least = torch.stack([cost(torch.tensor(code).expand(ROWS, -1)) for code in itertools.product(values, repeat=BITS)]).amin(0)
    assert cost(found).mean() <= 1.3 * least.mean() < cost(start).mean()


@pytest.mark.parametrize("name", ["ba", "bdnn"])
def test_binary_autoencoders_reconstruct_better_than_their_start(name: str) -> None:
    """From which they begin: ITQ's codes."""
    kind = type(build(name))
    assert issubclass(kind, Classic)
    torch.manual_seed(0)
    method, x = kind(kind.Config(), (FEATURES,), 2, BITS), vectors()
    method.fit(x)
    codes = (method.hashing(x) > 0).float()
    before = (fit_itq(x, BITS, 0)(x) > 0).float()
    assert error(x, codes) < error(x, before) < error(x, torch.zeros_like(before))
    assert isinstance(method, BA) or 0.25 < codes.mean() < 0.75


def test_half_gaussians_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 100_000, generator=draw).abs().unbind()
    peak, below, above = half_gaussians(torch.cat([0.7 - 0.02 * left, 0.7 + 0.1 * right]))
    assert abs(peak - 0.7) < 0.01 and abs(below - 0.02) < 0.005 and abs(above - 0.1) < 0.01


def test_clusters_of_two_domains_have_concentrations() -> None:
    banks = [ConcentratedBank(3, 2), ConcentratedBank(3, 2)]
    angles = torch.tensor([0.0, 0.1, 2.0, 2.4, 4.0, 4.1, 0.05, 2.2, 4.05])
    slots = torch.stack([angles.cos(), angles.sin()], 1)
    for bank, part in zip(banks, slots.split([6, 3]), strict=True):
        bank.fill(part, len(part))
    cluster_together(banks, torch.Generator().manual_seed(0), 0.2)
    members = torch.cat([bank.members for bank in banks])
    assert banks[0].centroids.equal(banks[1].centroids) and members[0] == members[1] == members[6] and len(set(members.tolist())) == 3
    phi = []
    for cluster in range(3):
        own = slots[members == cluster]
        phi.append(float((own - banks[0].centroids[cluster]).norm(dim=1).sum()) / (len(own) * math.log(len(own) + 10)))
    assert torch.allclose(banks[0].concentration, torch.tensor(phi) / (sum(phi) / 3) * 0.2) and isinstance(banks[0], MemoryBank)


def test_drawn_bits_pass_the_gradient_to_their_probabilities() -> None:
    probabilities = torch.tensor([[0.9, 0.1] * 8] * 500, requires_grad=True)  # 16 bits
    bits = drawn_bits(probabilities, torch.Generator().manual_seed(0))
    assert set(bits.detach().round().unique().tolist()) == {0.0, 1.0} and torch.allclose(bits.detach(), bits.detach().round())
    assert torch.allclose(bits.detach().mean(0), probabilities.detach()[0], atol=0.06)
    (3 * bits).sum().backward()
    assert probabilities.grad is not None and (probabilities.grad == 3).all()


def test_sghs_prior_is_a_divergence_of_bernoullis() -> None:
    method, logits = build("sgh"), torch.tensor([[2.0, -2.0] * 8] * 5)
    method.others["prior"].data.fill_(0.5)
    prior = torch.distributions.Bernoulli(logits=torch.full_like(logits, 0.5))
    wanted = torch.distributions.kl_divergence(torch.distributions.Bernoulli(logits=logits), prior).sum(1).mean()
    assert torch.allclose(method._divergence(logits), wanted)


@pytest.mark.parametrize("name", ["dan", "dann", "cdan", "mstn", "drcn"])
def test_an_adaptation_row_adds_its_term_to_the_head(name: str) -> None:
    """Its weight grows from zero where the paper's does."""
    method = build(name, dropout=0.0)
    for progress, moves in ((0.0, name in ("dan", "drcn")), (0.5, True)):
        method.begin_step(progress)
        terms, weights = method.losses("encoder", global_batch(0)), method.weights("encoder")
        added = terms.keys() - {"classification", "hash", "relaxation"}
        assert len(terms) == 3 + len(added) and added
        method.players["encoder"].optimizer.zero_grad()
        torch.stack([weights[each] * terms[each] for each in added]).sum().backward()
        gradients = [p.grad.abs().sum() for p in method.network.parameters() if p.grad is not None]
        assert bool(torch.stack(gradients).sum() > 0) == moves


def test_adda_trains_the_targets_network_beside_the_fixed_sources() -> None:
    method = build("adda", dropout=0.0, pretrained_share=0.5)
    for epoch in range(2):
        method.begin_epoch(epoch, 2)
        method.begin_step(epoch / 2)
        assert method.is_active("discriminator") == (epoch == 1)
        terms = method.losses("encoder", global_batch(epoch))
        assert terms.keys() == ({"deceiving"} if epoch else {"classification", "hash", "relaxation"})
    before = {name: each.clone() for name, each in method.source_network.state_dict().items()}
    terms["deceiving"].backward()
    assert all(p.grad is None for p in method.source_network.parameters()) and any(p.grad is not None for p in method.network.parameters())
    assert all(each.equal(before[name]) for name, each in method.source_network.state_dict().items())


def test_adda_never_ends_without_adapting() -> None:
    method = build("adda", pretrained_share=0.8)
    with pytest.raises(ValueError, match="at least 2 --epochs"):
        method.begin_epoch(0, 1)
    method.begin_epoch(1, 2)
    assert method.is_active("discriminator")


def test_coral_maps_the_source_alone() -> None:
    method = build("coral", augment=False)
    method.maps["source"].take(torch.zeros(256).numpy(), 2 * torch.eye(256).numpy())
    x = domain_batch(0, 0).x
    assert torch.allclose(method.maps["source"](method.extractor(x)), 2 * method.maps["target"](method.extractor(x)))
    assert method.encode(x).equal(method.network.eval()(method.extractor(x))[1]) or method.averaged is not None
