"""DAH: its gradients under DDP, its players, its recognition, its terms."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from data.batches import DomainBatch
from data.transforms import random_view, seeded
from models.dah import DAH, DPSH, DAHConfig, DPSHConfig
from models.distributed import BatchNorm
from models.method import Batch
from models.registry import METHODS, find
from pipelines.loop import PlayerStep

CLASSES, PER_CLASS, STEPS = 3, 4, 3
CONFIG = DAHConfig(dropout=0.0, per_class=PER_CLASS, pretrained="none")


def global_batch(step: int, rank: int, world: int) -> Batch:
    """One rank's part of a fixed global batch, views drawn as the batches draw them."""
    random = seeded(7, step)
    n = CLASSES * PER_CLASS
    x_s, x_t = (torch.randint(0, 256, (n, 1, 16, 16), generator=random, dtype=torch.uint8) for _ in range(2))
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    share = slice(rank * n // world, (rank + 1) * n // world)
    views = [(random_view(x[share], seeded(step, i), rank, world),) for i, x in enumerate((x_s, x_t))]
    rows = torch.arange(n)[share]
    return Batch(DomainBatch(x_s[share], views[0], labels[share], rows), DomainBatch(x_t[share], views[1], None, rows))


def train_steps(config: DAHConfig, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Parameters and statistics after a few steps, and the first step's gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    method = DAH(config, (1, 16, 16), CLASSES, 16).train()
    step = PlayerStep(method, "encoder")
    wrapped = DistributedDataParallel(step, broadcast_buffers=False) if world > 1 else step
    optimizer = method.players["encoder"].optimizer
    result = {}
    for index in range(STEPS):
        optimizer.zero_grad()
        wrapped(global_batch(index, rank, world))[0].backward()
        if not index:
            result = {f"grad {name}": p.grad.clone() for name, p in method.network.named_parameters() if p.grad is not None}
        optimizer.step()
        method.end_step()
    return result | {name: tensor.clone() for name, tensor in method.kept().state_dict().items()}


def worker(rank: int, world: int, folder: str, config: DAHConfig) -> None:
    """One rank of the comparison; leaves its result in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(train_steps(config, rank, world), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("estimate", ["quadratic", "linear"])
def test_two_workers_give_the_gradients_of_one(estimate: str, tmp_path: Path) -> None:
    """Batch-norm included: it takes the moments of the global batch."""
    config = DAHConfig(**vars(CONFIG) | {"mmd_estimate": estimate, "pseudo_threshold": 0.34, "optimizer": "sgd", "learning_rate": 0.05})
    alone = train_steps(config, 0, 1)
    mp.spawn(worker, (2, str(tmp_path), config), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=0.01)
            assert error < 1e-3, f"{name} differs by {error:.1e}"


def test_our_batch_norm_is_torchs_outside_a_group() -> None:
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm1d(5)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_terms_follow_the_weights() -> None:
    torch.manual_seed(0)
    batch = global_batch(0, 0, 1)
    assert set(DAH(CONFIG, (1, 16, 16), CLASSES, 16).losses("encoder", batch)) == {"hash", "quantisation", "mmd", "entropy", "pseudo"}
    paper = DAH(DAHConfig.paper(), (1, 16, 16), CLASSES, 16)
    assert set(paper.losses("encoder", batch)) == {"hash", "quantisation", "mmd", "entropy"}
    assert paper.averaged is None and paper.wants.views == 0
    source_only = DPSH(DPSHConfig(), (1, 16, 16), CLASSES, 16)
    assert set(source_only.losses("encoder", batch)) == {"hash", "quantisation"}
    assert not source_only.wants.target


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    torch.manual_seed(0)
    method = DAH(CONFIG, (1, 16, 16), CLASSES, 16).train()
    loss, terms = method.loss("encoder", global_batch(0, 0, 1))
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
        find("dpsj")
