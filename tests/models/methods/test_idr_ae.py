"""IDR-AE and its relatives: distances between codes, terms, balanced bits."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.losses.matching import assignment_distance, bitwise_distance
from models.methods import idr_ae
from models.methods.idr_ae import IDRAE
from tests.models.players import build, global_batch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_bitwise_distance_is_the_best_assignment_of_each_bit() -> None:
    b, z = random(5, 3), (random(5, 3, seed=1) > 0.5).float()
    best = [min((b[list(order), bit] - z[:, bit]).abs().mean() for order in itertools.permutations(range(5))) for bit in range(3)]
    assert bitwise_distance(b, z).item() == pytest.approx(torch.stack(best).mean().item())
    assert bitwise_distance(b[[4, 2, 0, 1, 3]], z).item() == pytest.approx(bitwise_distance(b, z).item())
    assert bitwise_distance(z[[1, 0, 2, 4, 3]], z).item() == 0


def test_the_assignment_distance_is_the_best_assignment_of_whole_codes() -> None:
    b, z = random(5, 3).requires_grad_(), (random(5, 3, seed=1) > 0.5).float()
    best = min(((b[list(order)] - z).norm(dim=1).mean() for order in itertools.permutations(range(5))), key=lambda each: each.item())
    found = assignment_distance(b, z)
    assert found.item() == pytest.approx(best.item())
    (gradient,), (wanted,) = torch.autograd.grad(found, b), torch.autograd.grad(best, b)
    torch.testing.assert_close(gradient, wanted)  # the assignment itself takes none


@pytest.mark.parametrize("matching", ["none", "critic", "assignment", "bitwise"])
def test_the_autoencoders_terms_and_codes(matching: str) -> None:
    method = build("idr-ae", matching=matching)
    assert isinstance(method, IDRAE)
    terms = method.losses("autoencoder", global_batch(0))
    assert set(terms) == {"reconstruction"} | ({"matching"} if matching != "none" else set())
    features = torch.cat([part.x for part in global_batch(0) if part is not None]).flatten(1) / 255
    b = method.networks["encoder"](features)
    squares = (method.networks["decoder"](b) - features).square()
    assert terms["reconstruction"].item() == pytest.approx((squares.mean() / features.var(0).mean()).item())
    for error, wanted in (("mean", squares.mean()), ("sum", squares.sum(1).mean())):
        method.config = replace(method.config, error=error)
        assert method.losses("autoencoder", global_batch(0))["reconstruction"].item() == pytest.approx(wanted.item())
    assert set(method.players) == ({"autoencoder", "critic"} if matching == "critic" else {"autoencoder"})
    codes = method.encode(global_batch(0).target.x)  # type: ignore[union-attr]
    assert torch.equal(codes > 0, method.ema_networks["encoder"](features[len(features) // 2 :]) > 0.5)


def test_feature_vectors_are_taken_less_the_mean_of_all_workers_and_pixels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = IDRAE(IDRAE.Config(width=8), (6,), 3, 16).networks["encoder"]
    first, second, other = random(5, 6), random(5, 6, seed=1), random(5, 6, seed=2)
    encoder.centre(first)
    torch.testing.assert_close(encoder.centre(second), second - torch.cat([first, second]).mean(0))
    encoder.eval()
    torch.testing.assert_close(encoder.centre(other), other - torch.cat([first, second]).mean(0))  # which it does not add
    encoder.train()
    monkeypatch.setattr(idr_ae, "gather", lambda mean: torch.cat([mean, first.mean(0, keepdim=True)]))  # beside another worker
    encoder.centre(other)
    torch.testing.assert_close(encoder.centre.mean, torch.cat([first, first, second, second, other, first]).mean(0))
    assert isinstance(build("idr-ae").networks["encoder"].centre, nn.Identity)
    assert isinstance(IDRAE(IDRAE.Config(width=8, centred=False), (6,), 3, 16).networks["encoder"].centre, nn.Identity)


def test_the_matching_balances_the_bits() -> None:
    means = {}
    for matching in ("none", "bitwise"):
        method = build("idr-ae", matching=matching, matching_weight=3.0, average=0.0, width=64)
        for step in range(300):
            loss, _ = method.loss("autoencoder", global_batch(step))
            method.players["autoencoder"].optimizer.zero_grad()
            loss.backward()
            method.players["autoencoder"].optimizer.step()
        x = torch.cat([part.x for step in range(100, 110) for part in global_batch(step) if part is not None])
        means[matching] = (method.encode(x) > 0).float().mean(0)
    assert (means["bitwise"] - 0.5).abs().mean() < 0.2 < (means["none"] - 0.5).abs().mean()
