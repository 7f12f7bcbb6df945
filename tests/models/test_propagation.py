"""Pseudo-labels that are spread over neighbours."""

from pathlib import Path

import pytest
import torch

from data.batches import DomainLoader
from data.manifest import Manifest
from models.methods.igan import IGAN, IGANConfig
from models.propagation import equal_shares, neighbour_graph, propagate, propagated_classes
from models.transport import transport
from pipelines import train
from tests.models.players import build, trained
from tests.pipelines.training.disturbed import dying, equal
from tests.pipelines.training.test_photographs import parameters


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three well separated clusters of 40 rows each, and the cluster of each."""
    generator, member = torch.Generator().manual_seed(0), torch.arange(120) % 3
    return torch.eye(3).repeat(1, 4)[member] + 0.2 * torch.randn(120, 12, generator=generator), member


def test_neighbours_are_the_nearest_by_cosine_whatever_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = clusters()
    places, weights = neighbour_graph(features, 5)
    similar = torch.cosine_similarity(features.unsqueeze(0), features.unsqueeze(1), dim=2).fill_diagonal_(-2)
    assert all(set(row.tolist()) == set(near.topk(5).indices.tolist()) for row, near in zip(places, similar, strict=True))
    assert torch.allclose(weights.sum(1), torch.ones(120)) and bool((weights > 0).all())
    monkeypatch.setattr("models.propagation.PART", 7)
    assert torch.equal(neighbour_graph(features, 5)[0], places)
    assert neighbour_graph(features[:4])[0].shape == (4, 3)


def test_shares_become_equal_and_order_within_a_class_stays() -> None:
    probabilities = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 1.0, 0.5])
    balanced = equal_shares(probabilities / probabilities.sum(1, keepdim=True))
    assert torch.allclose(balanced.sum(1), torch.ones(60)) and torch.allclose(balanced.mean(0), torch.full((3,), 1 / 3), atol=1e-3)


def test_a_cluster_whose_rows_are_mostly_guessed_right_takes_its_class() -> None:
    features, member = clusters()
    generator = torch.Generator().manual_seed(2)
    wrong = torch.rand(120, generator=generator) < 0.45
    guess = torch.where(wrong, torch.randint(3, (120,), generator=generator), member)
    probabilities = torch.nn.functional.one_hot(guess, 3) * 0.6 + 0.4 / 3
    assert (guess == member).float().mean() < 0.8
    assert bool((propagated_classes(probabilities, neighbour_graph(features)) == member).all())
    alone = torch.stack([torch.arange(4).roll(1), torch.arange(4).roll(-1)], 1), torch.full((4, 2), 0.5)
    assert torch.allclose(propagate(torch.eye(4), alone).sum(1), torch.ones(4))


def test_guesses_are_in_the_checkpoint_and_the_training_resumes_with_them(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(storage: Path) -> Path:
        result = train.run(train.make_config({
            "method": "igan", "dataset": str(digits), "source": "typeset", "target": "handwritten", "labels": "propagated", "bits": 16, "epochs": 2,
            "per_class": 2, "steps_per_epoch": 4, "checkpoint_steps": 2, "workers": 0, "tracking": "none", "plots": False, "storage": str(storage),
        }))  # fmt: skip
        return storage / result["run_id"]

    plain = parameters(run(tmp_path / "plain"))
    assert len(plain["guesses.classes"]) > 1000 and len(plain["guesses.classes"].unique()) > 3
    with dying(monkeypatch):
        run(tmp_path / "stopped")
    (folder,) = [each.parent for each in (tmp_path / "stopped").glob("*/config.json")]
    train.run(train.make_config({"resume": folder.name, "storage": str(tmp_path / "stopped")}))
    assert equal(parameters(folder), plain)


def test_photographs_are_neighbours_by_what_the_network_makes_of_them(photographs: Path) -> None:
    torch.manual_seed(0)
    method = IGAN(IGANConfig(network="conv4", labels="propagated", views="crop"), (3, 80, 80), 3, 16)
    loader = DomainLoader(photographs, Manifest.read(photographs), "art", "train", 6, labels=False, views=1, view=method.wants.view)
    networks = method.ema_networks.eval()
    with torch.no_grad():
        features, _, codes = networks["network"].with_features(loader.cached_rows().x)
        guessed = networks["classifier"](codes).softmax(1)
    method.start_epoch(1, 3, None, loader)
    assert torch.equal(method.guesses.classes, propagated_classes(guessed, neighbour_graph(features)))
    assert method.graph is None  # it is made anew in each epoch


def test_a_training_without_pretraining_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--labels propagated needs --pretrain-epochs of at least 1"):
        build("igan", labels="propagated", pretrain_epochs=0)
    assert "kept guesses.classes" in trained("igan", {"labels": "propagated"}, tmp_path)


def test_a_transport_has_the_shares_that_are_asked_for() -> None:
    weights = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = transport(weights, shares, 200)
    torch.testing.assert_close(found.mean(0), shares, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(50, dtype=torch.float64))
    ratios = found / weights  # of one factor for the row and one for the column
    torch.testing.assert_close(ratios / ratios[:, :1], (ratios[:1] / ratios[0, 0]).expand(50, 4))
