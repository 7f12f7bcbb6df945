"""UCDIR and ProtoOT: their losses, clusters, memory banks and codes, and the weights that they start from."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from models import clustering, distributed
from models.clustering import _cluster_sums, _means, kmeans, nearest
from models.distributed import BatchNorm
from models.losses.contrastive import (
    attraction,
    cluster_probabilities,
    contrast,
    distance_of_distance,
    nearest_others,
    neighbour_loss,
    prototype_attraction,
    self_entropy,
)
from models.memory_bank import MemoryBank
from models.methods.memory_contrast import Embedding
from models.methods.ucdir import UCDIR
from models.networks.backbones import trunk_weights
from models.networks.extractors import Backbone
from tests.models.players import BITS, CLASSES, PER_CLASS, Fixed, build, global_batch

WIDTH = 128


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_contrast_and_attraction_are_equations_1_and_2() -> None:
    tau, members = 0.2, torch.tensor([0, 1, 0, 0, 1, 1])
    slots, x = normalize(random(6, 4)), normalize(random(2, 4, seed=1))
    own = torch.tensor([3, 4])
    pairs = (x @ slots.T / tau).exp()
    instance = -(pairs[[0, 1], own] / pairs.sum(1)).log().mean()
    denominator = contrast(x, slots, tau)
    assert attraction(x, slots[own], denominator, tau).item() == pytest.approx(instance.item(), rel=1e-5)
    each = [-(pairs[i, members == members[own[i]]] / pairs[i].sum()).log().mean() for i in range(2)]
    means = torch.stack([slots[members == k].mean(0) for k in range(2)])[members[own]]
    assert attraction(x, means, denominator, tau).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    counted = attraction(x, means, denominator, tau, torch.tensor([True, False]))
    assert counted.item() == pytest.approx(each[0].item(), rel=1e-5)
    assert attraction(x, means, denominator, tau, torch.tensor([False, False])).item() == 0


def test_a_sample_of_the_slots_counts_each_querys_own_once() -> None:
    slots, x = normalize(random(6, 4)), normalize(random(2, 4, seed=1))
    own, order = torch.tensor([3, 4]), torch.tensor([5, 3, 0, 1, 2, 4])
    whole = contrast(x, slots[order], 0.2, slots[own], own.unsqueeze(1) == order)
    torch.testing.assert_close(whole, contrast(x, slots, 0.2))
    without = contrast(x[:1], slots[[0, 1]], 0.2, slots[own[:1]], torch.zeros(1, 2, dtype=torch.bool))
    torch.testing.assert_close(without, contrast(x[:1], slots[[0, 1, 3]], 0.2))


def test_distance_of_distance_does_not_ask_for_the_clusters_order() -> None:
    one, other = random(4, 3).softmax(1), random(4, 3, seed=1).softmax(1)

    def cosine(p: torch.Tensor, i: int, j: int) -> torch.Tensor:
        return 1 - (p[i] * p[j]).sum() / p[i].norm() / p[j].norm()

    pairs = [(cosine(one, i, j) - cosine(other, i, j)).square() for i in range(4) for j in range(4)]
    assert distance_of_distance(one, other).item() == pytest.approx(torch.stack(pairs).sum().item() / 4, rel=1e-4)
    torch.testing.assert_close(distance_of_distance(one[:, [2, 0, 1]], other), distance_of_distance(one, other))  # proposition 1
    assert distance_of_distance(one, one[:, [1, 2, 0]]).item() == pytest.approx(0, abs=1e-10)


def test_self_entropy_and_cluster_probabilities() -> None:
    assert self_entropy(torch.full((2, 4), 0.25)).item() == pytest.approx(math.log(4))
    assert self_entropy(torch.eye(3)).item() == 0
    probabilities = cluster_probabilities(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.5)
    assert probabilities[0, 0].item() == pytest.approx(math.e**2 / (math.e**2 + 1))


def test_the_heads_loss_is_least_where_codes_have_the_features_neighbours() -> None:
    features = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
    wanted = (features @ features.T / 0.5).exp()
    near = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    found = neighbour_loss(near, features, 2.0, 0.5)
    # scaled dot products of the codes: 1 between the first two, 0 to the third
    by_hand = [-sum(wanted[i, j] / (wanted[i].sum() - wanted[i, i]) * math.log(q) for j, q in zip(others, shares, strict=True)) for i, others, shares in (
        (0, (1, 2), (math.e**0.5 / (math.e**0.5 + 1), 1 / (math.e**0.5 + 1))), (1, (0, 2), (math.e**0.5 / (math.e**0.5 + 1), 1 / (math.e**0.5 + 1))),
        (2, (0, 1), (0.5, 0.5)),
    )]  # fmt: skip
    assert found.item() == pytest.approx(sum(each.item() for each in by_hand) / 3, rel=1e-5)
    assert found < neighbour_loss(near[[0, 2, 1]], features, 2.0, 0.5)


def test_kmeans_finds_separate_clouds() -> None:
    centres = normalize(torch.eye(4)[:3])
    x = normalize(centres.repeat(30, 1) + 0.05 * random(90, 4))
    found = kmeans(x, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert sorted((found @ centres.T).argmax(1).tolist()) == [0, 1, 2] and (found @ centres.T).amax(1).min() > 0.99
    assert torch.equal(found, kmeans(x, 3, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="2 images do not make 3 clusters"):
        kmeans(x[:2], 3, torch.Generator())


def test_kmeans_is_as_good_as_scikit_learns() -> None:
    x = normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(8).repeat(50, 1))
    members = nearest(x, kmeans(x, 8, torch.Generator().manual_seed(0)))
    error = sum((x[members == k] - x[members == k].mean(0)).square().sum() for k in range(8))
    assert error < 1.03 * KMeans(8, n_init=5, max_iter=20, random_state=0).fit(x.numpy()).inertia_


def test_kmeans_ends_where_no_iteration_would_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, passes = normalize(random(90, 4)), list[int]()
    monkeypatch.setattr(clustering, "_cluster_sums", lambda *given: passes.append(1) or _cluster_sums(*given))
    early = kmeans(x, 5, torch.Generator().manual_seed(0))
    count = len(passes)
    monkeypatch.setattr(torch, "equal", lambda *pair: False)
    late = kmeans(x, 5, torch.Generator().manual_seed(0))
    monkeypatch.undo()
    assert torch.equal(early, late) and count < len(passes) - count == clustering.RESTARTS * (clustering.ITERATIONS + 1)


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    x = normalize(torch.eye(3)[[0] * 40 + [1] * 30 + [2] * 20] + 0.2 * random(90, 3))
    first = torch.stack([x[0], x[0], x[50], x[80]])  # the second is empty: the first is as near
    centroids = _means(*_cluster_sums(x, first)[:2]).float()
    assert sorted(torch.bincount(nearest(x, first), minlength=4).tolist()) == [0, 20, 30, 40]
    assert nearest(x, centroids).unique().tolist() == [0, 1, 2, 3]


def started(**own: object) -> UCDIR:
    method = build("ucdir", cluster_start=0.0, **own)
    assert isinstance(method, UCDIR)
    method.begin(Fixed(0), Fixed(1))
    return method


def test_ucdirs_slots_are_filled_written_and_kept(tmp_path: Path) -> None:
    method, batch = started(), global_batch(3)
    slots = method.memory["source"].slots
    assert slots.shape == (CLASSES * PER_CLASS, WIDTH)
    torch.testing.assert_close(slots.norm(dim=1), torch.ones(len(slots)))
    torch.testing.assert_close(slots, method.features(global_batch(0).source.x))  # type: ignore[union-attr]
    method.begin_epoch(0, 10, Fixed(0), Fixed(1))
    before = slots.clone()
    keys = copy.deepcopy(method.ema_networks["embedding"]).train()(torch.cat([batch.source.views[1], batch.target.views[1]]))  # type: ignore[union-attr]
    method.losses("encoder", batch)
    torch.testing.assert_close(method.memory["source"].slots, keys[: len(slots)])
    assert not torch.equal(before, method.memory["source"].slots)
    fresh = build("ucdir", cluster_start=0.0)
    fresh.state_modules().load_state_dict(method.state_modules().state_dict())
    assert torch.equal(fresh.memory["target"].slots, method.memory["target"].slots)  # type: ignore[attr-defined]


def test_ucdirs_terms_come_by_equation_4() -> None:
    method, batch = started(cluster_full=0.5, cluster_weight=2.0), global_batch(0)
    found = {}
    for epoch in range(10):
        method.begin_epoch(epoch, 10, Fixed(0), Fixed(1))
        found[epoch] = (method.weights("encoder")["cluster"], set(method.losses("encoder", batch)))
    always = {"instance", "neighbours", "quantisation"}
    assert found[0] == (0.0, always)
    assert found[2] == (pytest.approx(0.8), always | {"cluster"})
    assert found[5] == found[9] == (2.0, always | {"cluster", "entropy", "distance"})


def test_ucdirs_codes_are_of_the_head_or_of_itq_on_the_slots() -> None:
    x = torch.randint(0, 256, (5, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    head, itq, trained = started(), started(codes="itq"), started(ranking="trained")
    with torch.no_grad():
        trained.networks["hash"].linear.bias.add_(1)
        trained.networks["embedding"].head[2].bias.add_(0.1)
    assert torch.equal(trained.features(x), trained.networks["embedding"](x)) and not torch.equal(trained.features(x), head.features(x))
    torch.testing.assert_close(trained.encode(x), trained.networks["hash"](trained.features(x))[1])
    torch.testing.assert_close(head.encode(x), head.ema_networks["hash"](head.features(x))[1])
    for memory in itq.memory.values():
        memory.fill(normalize(torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))), 60)
    made = itq.encoder()
    assert made(x).shape == (5, BITS) and not torch.equal(made(x) > 0, head.encode(x) > 0)


def test_a_memory_keeps_the_sums_of_its_clusters_and_of_a_row_seen_twice_the_last() -> None:
    memory, keys = MemoryBank(2, WIDTH), normalize(random(5, WIDTH, seed=1))
    memory.fill(normalize(random(7, WIDTH)), 7)
    memory.cluster(memory.slots, torch.Generator().manual_seed(0))
    memory.store(torch.tensor([3, 0, 3, 6, 3]), keys)
    assert torch.equal(memory.slots[3], keys[4]) and torch.equal(memory.slots[0], keys[1])
    means = torch.stack([memory.slots[memory.members == k].mean(0) for k in range(2)])
    torch.testing.assert_close(memory.cluster_means(), means)


@pytest.mark.parametrize("sums", [True, False])
def test_each_rank_loads_its_part_of_a_memory_also_of_one_saved_without_sums(sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = MemoryBank(3, WIDTH)
    saved.fill(random(7, WIDTH), 7)
    saved.cluster(saved.slots, torch.Generator().manual_seed(0))
    state = {name: tensor for name, tensor in saved.state_dict().items() if sums or name not in ("sums", "sizes")}
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for each in range(2):
        monkeypatch.setattr(distributed, "rank", lambda each=each: each)
        parts.append(MemoryBank(3, WIDTH))
        parts[-1].load_state_dict(state)
        assert (parts[-1].total, parts[-1].first) == (7, 3 * each)
        torch.testing.assert_close(parts[-1].cluster_means(), saved.cluster_means())
        assert parts[-1].sample(torch.tensor([6, 2, 3])).tolist() == [[2], [3, 0]][each]
    assert torch.equal(torch.cat([part.slots for part in parts]), saved.slots)
    assert torch.equal(torch.cat([part.members for part in parts]), saved.members)


def test_mocos_checkpoint_initialises_a_resnet(tmp_path: Path) -> None:
    plain = Backbone("resnet18", (3, 32, 32), "none")
    state = {f"module.encoder_q.{key}": tensor + 1 for key, tensor in plain.trunk[1].state_dict().items()}  # type: ignore[index]
    path = tmp_path / "moco_v2_800ep_pretrain.pth.tar"
    torch.save({"epoch": 800, "state_dict": state | {"module.queue": torch.zeros(2)}}, path)
    loaded = Backbone("resnet18", (3, 32, 32), str(path))
    name = "layer1.0.conv1.weight"
    assert torch.equal(loaded.trunk[1].state_dict()[name], state[f"module.encoder_q.{name}"])  # type: ignore[index]
    assert "queue" not in trunk_weights({"state_dict": state})
    assert loaded(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, loaded.features)
    assert not loaded.head
    head = {f"module.encoder_q.fc.{place}.{kind}": random(*shape) for place, kind, shape in (
        (0, "weight", (512, 512)), (0, "bias", (512,)), (2, "weight", (WIDTH, 512)), (2, "bias", (WIDTH,)),
    )}  # fmt: skip
    torch.save({"state_dict": state | head}, path)
    embedding = Embedding(Backbone("resnet18", (3, 32, 32), str(path)))
    for place in (0, 2):
        assert torch.equal(embedding.head[place].weight, head[f"module.encoder_q.fc.{place}.weight"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts from MoCo v2's resnet50: give its checkpoint's path by --pretrained, or none"):
        UCDIR(UCDIR.preset("paper"), (3, 64, 64), 7, 64)
    (note,) = UCDIR(UCDIR.Config(network="resnet18", pretrained="none"), (3, 64, 64), 7, 64).notes
    assert "resnet18 starts from random weights" in note and not started().notes
    with pytest.raises(ValueError, match="not those of a resnet18: they lack layer"):
        torch.save({"state_dict": {key: value for key, value in state.items() if "layer" not in key}}, path)
        Backbone("resnet18", (3, 32, 32), str(path))


def test_the_momentum_encoder_has_statistics_of_its_own_batches() -> None:
    method = started(average=0.999)
    kept = method.ema_networks["embedding"]
    for step in range(40):
        loss, _ = method.loss("encoder", global_batch(step))
        method.players["encoder"].optimizer.zero_grad()
        loss.backward()
        method.players["encoder"].optimizer.step()
        method.end_step()
    assert not kept.training and all(p.grad is None for p in kept.parameters())
    x = torch.cat([part.views[1] for step in range(30, 40) for part in global_batch(step) if part is not None])
    exact = copy.deepcopy(kept).train()
    norms = [[each for each in network.modules() if isinstance(each, BatchNorm)] for network in (kept, exact, method.networks["embedding"])]
    for each in norms[1]:
        each.momentum = 1.0  # the next batch's statistics alone
    exact(x)
    assert norms[0]
    for own, wanted, trained in zip(*norms, strict=True):
        ratio = own.running_var / wanted.running_var  # averaged with 0.999 like the parameters it would be off by the initial 1
        assert 0.6 < ratio.median() < 1.6 and not torch.equal(own.running_var, trained.running_var)


def test_clusters_are_of_plain_images_encoded_anew() -> None:
    method = started()
    with torch.no_grad():
        for memory in method.memory.values():
            memory.slots.zero_()  # nothing of what the slots hold reaches the clusters
    method.start_epoch(3, 10, Fixed(0), Fixed(1))
    memory = method.memory["source"]
    plain = method.features(global_batch(0).source.x)  # type: ignore[union-attr]
    assert torch.equal(memory.members, (plain @ memory.centroids.T).argmax(1)) and len(memory.members.unique()) > 1


def test_prototype_attraction_takes_all_prototypes_but_an_images_own_as_negatives() -> None:
    q, positive, prototypes = normalize(random(3, 5)), normalize(random(3, 5, seed=1)), normalize(random(4, 5, seed=2))
    own, tau = torch.tensor([2, 0, 2]), 0.3
    losses = []
    for i in range(3):
        wanted = math.exp(float(q[i] @ positive[i]) / tau)
        losses.append(-math.log(wanted / (wanted + sum(math.exp(float(q[i] @ prototypes[k]) / tau) for k in range(4) if k != own[i]))))
    assert prototype_attraction(q, positive, prototypes, own, tau).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_the_nearest_slot_is_of_another_image() -> None:
    slots = normalize(random(6, 4))
    own = torch.eye(6, dtype=torch.bool)[:3]
    found = nearest_others(slots[:3], slots, own)
    for i in range(3):
        others = [k for k in range(6) if k != i]
        assert torch.equal(found[i], slots[max(others, key=lambda k, i=i: float(slots[i] @ slots[k]))])  # type: ignore[misc]


def test_protoot_assigns_images_within_and_across_domains_by_their_clusters_shares() -> None:
    method: Any = build("protoot", cross_start=0.5, epsilon=0.02, clusters_per_class=1)
    method.begin(Fixed(0), Fixed(1))
    for domain, number in (("source", 0), ("target", 1)):  # clusters of 6, 4 and 2 images
        centres = torch.nn.functional.one_hot(torch.tensor([0] * 6 + [1] * 4 + [2] * 2), WIDTH).float()
        method.memory[domain].slots = normalize(centres + 0.02 * random(12, WIDTH, seed=number))
    method.begin_epoch(0, 4, Fixed(0), Fixed(1))
    assert not method.crossing and not len(method.memory["source"].across)
    method.begin_epoch(2, 4, Fixed(0), Fixed(1))
    for domain, other in (("source", "target"), ("target", "source")):
        bank, there = method.memory[domain], method.memory[other]
        groups = [set(bank.members[part].tolist()) for part in (slice(0, 6), slice(6, 10), slice(10, 12))]
        assert [len(group) for group in groups] == [1, 1, 1] and len(set.union(*groups)) == 3
        assert torch.equal(bank.across, nearest(bank.slots, there.centroids))  # the domains' clusters are alike here
        plan = bank.transported(bank.centroids, torch.tensor([0.2, 0.3, 0.5]), 0.02)
        torch.testing.assert_close(plan.sum(1), torch.ones(12))
    terms = method.losses("encoder", global_batch(0))
    assert {"instance", "neighbour", "prototype", "cross"} <= set(terms) == set(method.weights("encoder"))
