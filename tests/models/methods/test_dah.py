"""DAH: its recognition, its terms, its rates."""

import copy

import pytest
import torch

from models.distributed import BatchNorm
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
    paper = DAH(DAHConfig.paper(), SHAPE, CLASSES, BITS)
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
    config = DAHConfig.paper()
    method = DAH(DAHConfig(**vars(config) | {"pretrained": "none", "network": "lenet"}), (1, 28, 28), 10, 64)
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
