"""IGAN, SIGAN and DTN: their terms against hand-made values, their phases, their translations, and what ends a training."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from data.rows import DomainBatch
from models.distributed import BatchNorm
from models.losses.adversarial import critic_loss, deceiving_loss, generated_loss, generator_loss, gradient_penalty, real_class_loss
from models.losses.alignment import centroid_distance, class_means, imbalance_loss
from models.losses.hashing import similarity_loss
from models.method import Batch
from models.methods.dtn import DTN
from models.methods.igan import IGAN
from models.methods.sigan import SIGAN
from models.networks.generative import Discriminator, Generator, halvings, stored
from models.networks.layers import unit
from models.networks.translation import attention_map, to_network_input, total_variation
from models.registry import find_method
from tests.models.players import BITS, CLASSES, PER_CLASS, build, global_batch

ENCODER_TERMS = {"classification", "pseudo", "hash", "relaxation", "centroid", "adversarial", "l1", "entropy", "balance"}


def test_similarity_loss_is_half_the_mean_squared_error_of_pairs() -> None:
    codes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    # scaled dot products: 1 with itself, 0 between neighbours, -1 between the first and the last
    like = similarity_loss(codes, torch.tensor([0, 0, 1]))
    assert like.item() == pytest.approx((0 * 3 + 2 * 1 + 2 * 1 + 2 * 0) / 9 / 2)
    assert similarity_loss(codes, torch.tensor([0, -1, 1])).item() == 0


def test_centroid_distance_counts_classes_that_both_batches_have() -> None:
    source, target = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]), torch.tensor([[1.0, 4.0], [5.0, 5.0], [7.0, 7.0]])
    distance = centroid_distance(source, torch.tensor([0, 0, 1]), target, torch.tensor([0, -1, 2]), 3)
    assert distance.item() == pytest.approx(4.0)
    means, present = class_means(source, torch.tensor([0, 0, 1]), 3)
    assert means.tolist() == [[1, 0], [9, 9], [0, 0]] and present.tolist() == [True, True, False]
    codes = torch.zeros(1, 2, requires_grad=True)
    centroid_distance(codes, torch.tensor([0]), codes, torch.tensor([0]), 1).backward()
    assert codes.grad is not None and codes.grad.isfinite().all()


def test_imbalance_is_least_where_the_guesses_have_each_class_as_often() -> None:
    sure = 50.0 * one_hot(torch.tensor([0, 1, 2, 3]), 4)
    assert imbalance_loss(sure).item() == pytest.approx(0, abs=1e-6)
    assert imbalance_loss(sure[:2]).item() == pytest.approx(math.log(4 / 2))
    assert imbalance_loss(sure[:1]).item() == pytest.approx(math.log(4))


def test_a_discriminator_of_classes_and_generated() -> None:
    even = torch.zeros(2, 4)  # three classes and "generated", each a quarter
    assert generated_loss(even).item() == pytest.approx(math.log(4))
    assert deceiving_loss(even, torch.tensor([0, -1])).item() == pytest.approx(math.log(4) / 2)
    assert real_class_loss(even, torch.tensor([2, -1]), unlabelled=False).item() == pytest.approx(math.log(4) / 2)
    assert real_class_loss(even, torch.tensor([2, -1]), unlabelled=True).item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    sure = 50.0 * one_hot(torch.tensor([0, 3]), 4)
    assert real_class_loss(sure[:1], torch.tensor([-1]), True).item() == pytest.approx(0, abs=1e-6)
    assert real_class_loss(sure[1:], torch.tensor([-1]), True).item() > 40


def test_critic_objectives() -> None:
    real, made = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 1.0])
    assert critic_loss(real, made, "wasserstein").item() == -3
    assert generator_loss(made, "wasserstein").item() == 0
    zero = torch.zeros(3)
    assert critic_loss(zero, zero, "gan").item() == pytest.approx(2 * math.log(2))
    assert generator_loss(torch.full((3,), 40.0), "gan").item() == pytest.approx(0, abs=1e-6)
    slope = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        slope[0].weight.fill_(1.5)  # a slope of length 3 everywhere
    penalty = gradient_penalty(slope, torch.randn(5, 4), torch.randn(5, 4), torch.rand(5))
    assert penalty.item() == pytest.approx(4.0, rel=1e-5)
    penalty.backward()
    assert slope[0].weight.grad is not None and slope[0].weight.grad.abs().sum() > 0


def test_attention_and_variation() -> None:
    layer = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]])
    assert attention_map(layer, scaled=False).tolist() == [[[4.0, 2.0]]]
    assert attention_map(layer, scaled=True).tolist() == [[[2.0, 1.0]]]
    step = torch.zeros(1, 1, 3, 3)
    step[..., 1:] = 3.0  # a rise of 3 across each of the two rows that have a neighbour below
    assert total_variation(step).item() == pytest.approx(6.0, abs=1e-2)
    assert to_network_input(torch.full((2, 1, 28, 28), 255)).shape == (2, 1, 32, 32)


@pytest.mark.parametrize("side", [16, 28, 32, 36])
def test_generators_make_what_discriminators_judge(side: int) -> None:
    made = Generator(BITS, (3, side, side), 4)(torch.randn(2, BITS))
    assert made.shape == (2, 3, side, side) and made.abs().max() <= 1
    assert Discriminator((3, side, side), 11, 4, spectral=True)(made).shape == (2, 11)
    assert Discriminator((7,), 11, 4, spectral=False)(Generator(BITS, (7,), 4)(torch.randn(2, BITS))).shape == (2, 11)


def test_sides_that_cannot_be_halved_are_said() -> None:
    assert [halvings((1, side, side)) for side in (28, 32, 64)] == [2, 4, 4]
    with pytest.raises(ValueError, match="27x27 pixels cannot be generated"):
        halvings((1, 27, 27))


def test_stored_undoes_unit() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(stored(unit(images, images=True)), images)


def test_igans_terms_follow_its_weights() -> None:
    batch = global_batch(0)
    full = build("igan", pretrain_epochs=0)
    assert set(full.losses("encoder", batch)) == ENCODER_TERMS
    assert set(full.losses("discriminator", batch)) == {"real", "generated"}
    none = dict.fromkeys(("adversarial_weight", "l1_weight", "hash_weight", "centroid_weight", "entropy_weight", "balance_weight"), 0.0)
    alone = build("igan", pretrain_epochs=0, **none)
    assert set(alone.losses("encoder", batch)) == {"classification", "pseudo"} and list(alone.players) == ["encoder"]
    assert not alone.can_translate
    paper = build("igan", **{**vars(IGAN.preset("paper")), "per_class": PER_CLASS})
    paper.begin_epoch(0, 8)
    assert set(paper.losses("encoder", batch)) == {"classification", "hash", "relaxation"} and not paper.is_active("discriminator")
    paper.begin_epoch(2, 8)
    assert set(paper.losses("encoder", batch)) == ENCODER_TERMS - {"entropy", "balance"} and paper.is_active("discriminator")
    assert paper.averaged is None and paper.wants.views == 0


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    """alpha weighs the hash term and beta the centroids (eq. 11, not eq. 12)."""
    method = build("igan", dropout=0.0, hash_weight=3.0, centroid_weight=5.0, relaxation_weight=0.5, threshold=0.0, pretrain_epochs=0)
    loss, terms = method.loss("encoder", global_batch(0))
    c = method.config
    expected = terms["classification"] + c.pseudo_weight * terms["pseudo"] + 3 * (terms["hash"] + 0.5 * terms["relaxation"])
    expected += 5 * terms["centroid"] + c.adversarial_weight * terms["adversarial"] + c.l1_weight * terms["l1"] + c.entropy_weight * terms["entropy"]
    expected += c.balance_weight * terms["balance"]
    assert terms["centroid"] > 0 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_stage_begins_anew_with_all_but_the_encoder() -> None:
    method = build("igan", pretrain_epochs=1, stages=2)
    assert isinstance(method, IGAN)
    method.begin_epoch(0, 5)
    before = {name: tensor.clone() for name, tensor in method.state_modules().state_dict().items()}
    seen: list[dict[str, torch.Tensor]] = []
    for epoch in range(1, 5):
        method.begin_epoch(epoch, 5)
        seen.append({name: tensor.clone() for name, tensor in method.state_modules().state_dict().items()})
    changed = [{name for name in now if not torch.equal(now[name], then[name])} for then, now in zip([before, *seen], seen, strict=False)]
    assert [bool(each) for each in changed] == [True, False, True, False]  # the stages begin with epochs 1 and 3
    assert not any(name.startswith(("encoder.network", "averaged.module.network")) for each in changed for name in each)
    for part in ("encoder.classifier.", "encoder.source.", "encoder.target.", "discriminator.source.", "discriminator.target.", "averaged.module.classifier."):
        assert all(any(name.startswith(part) for name in each) for each in (changed[0], changed[2]))


def test_sigans_terms_follow_its_phases_and_weights() -> None:
    batch = global_batch(0)
    method = build("sigan", pretrain_epochs=1, label_interval=2)
    method.begin_epoch(0, 3)
    assert set(method.losses("generator", batch)) == {"source", "hash", "relaxation"} and not method.is_active("critic")
    method.begin_epoch(1, 3)
    usual = {"source", "semantic", "pseudo", "balance", "attention", "adversarial", "reconstruction", "variation", "hash", "relaxation"}
    assert set(method.losses("generator", batch)) == usual | {"label"}
    assert set(method.losses("critic", batch)) == {"critic", "penalty"}
    method.end_step()
    assert set(method.losses("generator", batch)) == usual
    later = build("sigan", pretrain_epochs=2)
    later.begin_epoch(1, 3)
    assert set(later.losses("generator", batch)) == {"source", "pseudo", "balance", "hash", "relaxation"}
    assert list(build("sigan", adversarial_weight=0.0).players) == ["generator"]


def test_label_consistency_moves_the_encoder_alone_and_the_semantic_term_the_generator() -> None:
    batch = global_batch(0)
    for term, generator_moves in (("label", False), ("semantic", True)):
        method = build("sigan", pretrain_epochs=0)
        assert isinstance(method, SIGAN)
        method.losses("generator", batch)[term].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encode_part.parameters())
        assert any(p.grad is not None for p in method.generator.parameters()) == generator_moves
        assert all(p.grad is None for network in (method.classifier, method.pretrained) for p in network.parameters())


def test_the_semantic_term_asks_the_networks_that_pretraining_left() -> None:
    method = build("sigan", pretrain_epochs=1, average=0.0)
    assert isinstance(method, SIGAN)
    method.begin_epoch(0, 3)
    with torch.no_grad():
        method.classifier.weight.add_(1)
    method.begin_epoch(1, 3)
    pretrained = method.classifier.weight.clone()
    with torch.no_grad():
        method.classifier.weight.add_(1)
    method.begin_epoch(2, 3)
    assert method.pretrained["classifier"].weight.equal(pretrained)  # type: ignore[attr-defined]


def test_clipping_bounds_the_critics_weights() -> None:
    method = build("sigan", pretrain_epochs=0, lipschitz="clip", clip=0.01)
    method.end_step()
    assert isinstance(method, SIGAN) and max(p.abs().max() for p in method.critic.parameters()) <= 0.01


@pytest.mark.parametrize("name", ["igan", "sigan", "dtn"])
def test_translations_have_the_form_of_their_originals(name: str) -> None:
    method = build(name).train(False)
    x = global_batch(0).source.x  # type: ignore[union-attr]
    made = method.translate(x)
    assert made.shape == x.shape and made.dtype == torch.uint8 and method.can_translate
    assert method.encode(x).shape == (len(x), BITS) and method.classify(x).exp().sum(1).allclose(torch.ones(len(x)))


@pytest.mark.parametrize("name", ["sigan", "dtn"])
@pytest.mark.parametrize("shape", [(24,), (3, 64, 64)], ids=["features", "photographs"])
def test_features_and_photographs_are_translated_as_vectors(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    method: Any = find_method(name)(find_method(name).Config(width=4, pretrain_epochs=0, per_class=2), shape, CLASSES, BITS)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2 * CLASSES, 24, generator=generator) if len(shape) == 1 else torch.randint(0, 256, (2 * CLASSES, *shape), generator=generator).byte()
    labels, rows = torch.arange(CLASSES).repeat(2), torch.arange(2 * CLASSES)
    batch = Batch(DomainBatch(x, (x.float(),), labels, rows), DomainBatch(x.flip(0), (x.flip(0).float(),), None, rows))
    method.train()
    before = {key: value.clone() for key, value in method.taken.state_dict().items()}
    for player in method.players:
        loss, terms = method.loss(player, batch)
        assert torch.isfinite(loss) and not {"attention", "variation"} & set(terms)
        loss.backward()
        method.players[player].optimizer.step()
        method.end_step()
    assert all(torch.equal(before[key], value) for key, value in method.taken.state_dict().items())
    method.train(False)
    made = method.translate(x)
    assert made.shape == (len(x), 24 if len(shape) == 1 else 1280) and not method.can_translate
    assert method.encode(x).shape == (len(x), BITS) and method.classify(x).exp().sum(1).allclose(torch.ones(len(x)))
    if len(shape) == 1:  # the length does not count
        torch.testing.assert_close(method.encode(4 * x), method.encode(x))
    exported = torch.export.export(method.encoder(), (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x), method.encode(x), atol=1e-5, rtol=1e-4)


def test_collapsed_players_are_named() -> None:
    assert not build("igan").failure({"real": 0.4, "generated": 0.1}) and not build("igan").failure({"classification": 0.0})
    assert "the discriminators tell every generated image" in build("igan").failure({"real": 1e-5, "generated": 1e-6})
    assert "run away" in build("sigan").failure({"critic": -2e4}) and not build("sigan").failure({"critic": -20.0})
    assert "tells every translated image" in build("dtn").failure({"critic": 1e-6}) and not build("sigan").failure({"source": 1.0})


def test_dtn_fixes_the_extractor_and_judges_three_kinds_of_images() -> None:
    batch = global_batch(0)
    method = build("dtn", pretrain_epochs=1)
    assert isinstance(method, DTN)
    method.begin_epoch(0, 3)
    assert set(method.losses("generator", batch)) == {"source", "hash", "relaxation"}
    method.begin_epoch(1, 3)
    terms = method.losses("generator", batch)
    assert set(terms) == {"constancy", "reconstruction", "variation", "adversarial", "hash", "relaxation"}
    before = copy.deepcopy(method.encode_part.state_dict())
    method.loss("generator", batch)[0].backward()
    assert all(p.grad is None for network in (method.encode_part, method.classifier, method.pretrained) for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in method.encode_part.state_dict().items())
    n = CLASSES * PER_CLASS
    assert method.made is not None and [len(part) for part in method.made] == [n, n, n]
    translated, reconstructed, real = method.made
    torch.testing.assert_close(real, to_network_input(batch.target.x))  # type: ignore[union-attr]
    scores = method.critic(torch.cat([translated, reconstructed, real])).log_softmax(1)
    assert scores.shape == (3 * n, 3)
    wanted = -(scores[:n, 0].sum() + scores[n : 2 * n, 1].sum() + scores[2 * n :, 2].sum()) / (3 * n)
    assert method.losses("critic", batch)["critic"].item() == pytest.approx(wanted.item(), rel=1e-5)
    deceived = -method.critic(torch.cat([translated, reconstructed])).log_softmax(1)[:, 2].mean()
    assert terms["adversarial"].item() == pytest.approx(deceived.item(), rel=1e-5)


def test_igan_reconstructs_the_first_layer_of_a_photographs_network() -> None:
    method = build("igan", made="layer", pretrain_epochs=0, network="lenet", dropout=0.0)
    assert isinstance(method, IGAN) and not method.can_translate
    batch = global_batch(0)
    terms = method.losses("encoder", batch)
    layers, _ = method.network(torch.cat([batch.source.views[0], batch.target.views[0]]))  # type: ignore[union-attr]
    wanted = torch.relu(layers[0])
    assert terms["l1"] > 0 and method.made["real source"].shape == (CLASSES * PER_CLASS, layers[0].shape[1])
    torch.testing.assert_close(torch.cat([method.made["real source"], method.made["real target"]]), wanted)
    assert not method.made["real source"].requires_grad
    with pytest.raises(ValueError, match="needs a network with a hidden fully connected layer"):
        build("igan", made="layer", network="conv4")


def test_the_papers_igan_has_constant_rates_and_no_hash_batch_norm() -> None:
    method = build("igan", **{**vars(IGAN.preset("paper")), "per_class": PER_CLASS})
    assert isinstance(method, IGAN) and not [each for each in method.network.modules() if isinstance(each, BatchNorm)]
    method.begin_step(0.5)
    rates = {name: {group["lr"] for group in player.optimizer.param_groups} for name, player in method.players.items()}
    assert rates == {"encoder": {0.01}, "discriminator": {0.001}}  # with one for both, as the paper writes, losses overflow
    assert IGAN.preset("paper-svhn").per_class * 10 == 200 and SIGAN.preset("paper").per_class * 10 == 200
    office = IGAN.preset("paper-office")
    assert (office.network, office.made, office.stages) == ("alexnet", "layer", 1)
