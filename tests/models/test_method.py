"""What every method inherits: its random draws, and how it makes pseudo-labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.clustering import RESTARTS
from models.hyperparameters import check_fields
from models.method import Method
from models.registry import METHODS
from tests.models.players import Fixed, build, global_batch


def drawn(seed: int, epoch: int, draws: int = 3) -> list[Tensor]:
    """The first draws of a method's epoch."""
    config = build("dah").config
    torch.manual_seed(seed)
    method = Method(config, (1, 16, 16), 3, 16)
    method.start_epoch(epoch, 10)
    return [torch.rand(4, generator=method.draw()) for _ in range(draws)]


def test_draws_repeat_and_differ_by_epoch_seed_and_number() -> None:
    again = drawn(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(drawn(0, 1), again, strict=True))
    several = [*drawn(0, 0), *again, *drawn(0, 2), *drawn(1, 0), *drawn(1, 1), *drawn(2**32, 1)]
    assert len({tuple(each.tolist()) for each in several}) == len(several)


def started(name: str, seed: int, epoch: int, **own: Any) -> Method:
    """A method with fixed networks at the beginning of an epoch, of a run with a seed."""
    method = build(name, **own)
    method.seed = seed
    if name == "ucdir":
        method.begin(Fixed(0), Fixed(1))
    method.start_epoch(epoch, 10, Fixed(0), Fixed(1))
    return method.train()


@pytest.mark.parametrize(
    ("name", "player", "own"),
    [
        ("dah", "encoder", {"mmd_estimate": "linear", "dropout": 0.0}), ("idr-ae", "autoencoder", {}), ("idr-ae", "autoencoder", {"matching": "assignment"}),
        ("ucdir", "encoder", {"negatives": 7, "cluster_weight": 0.0}), ("sigan", "critic", {"pretrain_epochs": 0}),
    ],
)  # fmt: skip
def test_what_a_method_draws_differs_by_epoch_and_seed(name: str, player: str, own: dict[str, Any]) -> None:
    found = []
    for seed, epoch in ((0, 7), (0, 8), (1, 7), (0, 7)):
        method = started(name, seed, epoch, **own)
        for each in method.players if player == "critic" else (player,):
            terms = method.losses(each, global_batch(0))
        found.append(sum(term.item() for term in terms.values()))
    assert len(set(found)) == 3 and found[0] == found[3]


@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_start_anew_each_epoch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []

    def kept(x: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
        starts.append(places)
        return x[places]

    monkeypatch.setattr("models.clustering._vectors", kept)
    for epoch in (5, 6):
        started("ucdir", seed, epoch)
    assert len({tuple(each.tolist()) for each in starts}) == len(starts) == 4 * RESTARTS  # two domains, two epochs


@pytest.mark.parametrize(("name", "own"), [("dah", {}), ("igan", {"pretrain_epochs": 0}), ("sigan", {"pretrain_epochs": 0})])
def test_pseudo_labels_without_an_averaged_copy_are_made_in_evaluation_mode(name: str, own: dict[str, Any]) -> None:
    own = own if name == "sigan" else own | {"dropout": 0.5}
    method = started(name, 0, 1, average=0.0, **own)
    networks = method.ema_networks
    x = global_batch(0).target.x  # type: ignore[union-attr]
    seen: list[Tensor] = []
    hooks = [each.register_forward_hook(lambda module, given, made: seen.append(module.training)) for each in networks.modules()]  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in networks.state_dict().items()}
    if name == "dah":
        u_s, labels = torch.rand(6, 16), torch.arange(6) % 3
        guesses = [method._pseudo_loss(x, torch.ones(len(x), 16), u_s, labels) for _ in range(2)]  # type: ignore[attr-defined]
    else:
        given = x if name == "igan" else torch.rand(6, 1, 32, 32)
        guesses = [method._pseudo_labels(given) for _ in range(2)]  # type: ignore[attr-defined]
    for hook in hooks:
        hook.remove()
    assert seen and not any(seen) and networks.training and torch.equal(*guesses)
    assert all(torch.equal(before[key], value) for key, value in networks.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_is_a_config_that_names_its_table(name: str) -> None:
    method = METHODS[name]
    assert "paper" in method.presets
    for preset, given in method.presets.items():
        check_fields(method.preset(preset))
        assert given.table and given.epochs >= 0
        assert not [key for key, value in given.values.items() if not hasattr(method.Config(), key)]
    assert method.preset("default") == method.Config()
