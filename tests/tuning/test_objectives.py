"""Label-free objectives against known values on hand-made codes."""

import math

import pytest
import torch
from torch import Tensor

from models.method import Method
from models.registry import METHODS
from tuning import objectives
from tuning.objectives import Outputs


def seen(target: Tensor | None = None, probabilities: Tensor | None = None, shift: float = 0.0) -> Outputs:
    """Source codes of four classes, well apart; a target of the same, moved by ``shift``."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(50)
    centres = torch.where(torch.rand(4, 16, generator=generator) < 0.5, -1.0, 1.0)
    source = (centres[labels] + 0.3 * torch.randn(200, 16, generator=generator)).tanh()
    moved = (centres[labels] + 0.3 * torch.randn(200, 16, generator=generator) + shift).tanh()
    made = torch.empty(0) if probabilities is None else probabilities
    codes = moved if target is None else target
    return Outputs(source, labels, source[:40], labels[:40], codes, made, codes)


def sharp(classes: list[int]) -> Tensor:
    """Log-probabilities that are sure of one class each."""
    return (torch.nn.functional.one_hot(torch.tensor(classes), 4) * 50.0).log_softmax(1)


def test_entropy_and_information() -> None:
    even, one, unsure = sharp([0, 1, 2, 3] * 25), sharp([2] * 100), torch.full((100, 4), 0.25).log()
    assert objectives.entropy(seen(probabilities=even)) == pytest.approx(0.0, abs=1e-6)
    assert objectives.entropy(seen(probabilities=unsure)) == pytest.approx(math.log(4), abs=1e-6)
    assert objectives.information(seen(probabilities=even)) == pytest.approx(math.log(4), abs=1e-5)
    assert objectives.information(seen(probabilities=one)) == pytest.approx(0.0, abs=1e-5)  # sure, of one class for all
    assert objectives.information(seen(probabilities=unsure)) == pytest.approx(0.0, abs=1e-5)


def test_source_map_is_of_held_out_images_or_of_each_in_the_others() -> None:
    given = seen()
    assert objectives.source_map(given) == pytest.approx(1.0, abs=1e-3)
    alone = given._replace(held=given.held[:0], held_labels=given.held_labels[:0])
    assert objectives.source_map(alone) == pytest.approx(1.0, abs=1e-3)
    mixed = given._replace(source_labels=given.source_labels.roll(1), held_labels=torch.arange(4).repeat_interleave(10))
    assert objectives.source_map(mixed) < 0.5


def test_density_counts_near_neighbours() -> None:
    clustered, spread = sharp([0, 1, 2, 3] * 25), torch.randn(100, 4, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    found = objectives.soft_neighbourhood_density(seen(probabilities=clustered))
    assert found == pytest.approx(math.log(24), abs=1e-3)  # each of a class of 25 has the 24 others alike
    assert objectives.soft_neighbourhood_density(seen(probabilities=spread)) < 5.0
    assert math.isfinite(objectives.soft_neighbourhood_density(seen()))  # by codes


def test_a_distance_tells_shifted_domains_apart() -> None:
    assert objectives.a_distance(seen()) < 0.5
    assert objectives.a_distance(seen(shift=1.0)) > 1.5


def test_rank_and_balance_of_bits() -> None:
    orthogonal = torch.eye(16).repeat(10, 1)
    assert objectives.rank(seen(orthogonal)) == pytest.approx(16.0, abs=1e-3)
    assert objectives.rank(seen(torch.ones(100, 16))) == pytest.approx(1.0, abs=0.05)
    half = torch.ones(100, 16)
    half[:50] = -1.0
    assert objectives.balance(seen(half)) == pytest.approx(1.0) and objectives.balance(seen(torch.ones(100, 16))) == 0.0
    half[50:75, :8] = -1.0  # the first eight bits: set in a quarter, whose entropy is 0.811
    assert objectives.balance(seen(half)) == pytest.approx((1.0 + 0.8113) / 2, abs=1e-3)


def test_mutual_neighbours_by_brute_force() -> None:
    given = seen(shift=0.5)
    source, target = (torch.nn.functional.normalize(codes) for codes in (given.source, given.target))
    similar = target @ source.T
    shared = total = 0
    for image in range(len(target)):
        for place in similar[image].argsort(descending=True)[: objectives.NEAR].tolist():
            shared += image in similar[:, place].argsort(descending=True)[: objectives.NEAR].tolist()
            total += 1
    assert objectives.mutual(given) == pytest.approx(shared / total)
    assert objectives.mutual(given) > objectives.mutual(seen(shift=3.0))


def test_neighbours_that_codes_keep() -> None:
    given = seen()
    assert objectives.kept(given) == 1.0  # the codes are the inputs
    other = torch.randn(len(given.target), 16, generator=torch.Generator().manual_seed(5))
    assert objectives.kept(given._replace(inputs=other)) < 0.15  # ten of 199 by chance
    assert objectives.kept(given._replace(inputs=given.inputs[:40])) == 1.0


def test_what_cannot_be_computed_is_not_a_number() -> None:
    found = objectives.objectives(seen())
    assert math.isnan(found["entropy"]) and math.isnan(found["information"])
    assert all(math.isfinite(found[name]) for name in ("source-map", "density", "a-distance"))
    bare = seen()._replace(source=torch.empty(0, 16), source_labels=torch.empty(0, dtype=torch.int64), held=torch.empty(0, 16))
    found = objectives.objectives(bare)
    assert math.isfinite(found["density"]) and math.isnan(found["source-map"]) and math.isnan(found["a-distance"])
    unlabelled = seen()._replace(source_labels=torch.full((200,), -1))
    assert math.isnan(objectives.objectives(unlabelled)["source-map"])


def test_the_default_can_be_computed_for_every_method() -> None:
    for kind in (each for each in METHODS.values() if not each.fitted):
        classifies = kind.classify is not Method.classify or kind.classify_codes is not Method.classify_codes
        for source, labelled in ((True, True), (True, False), (False, False)):
            needs = objectives.OBJECTIVES[objectives.default_objective(classifies, source, labelled)].needs
            assert ("classes" not in needs or classifies) and ("source" not in needs or source) and ("labels" not in needs or labelled)
