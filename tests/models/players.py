"""Trains a method for a few steps on fixed batches, in one process or two, and records the gradients of its players."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from data.rows import DomainBatch
from data.transforms import random_view, seeded_generator
from models.distributed import rank, world_size
from models.method import Batch, Method
from models.registry import find_method
from pipelines.training.loop import Trainer

CLASSES, PER_CLASS, BITS, SHAPE = 3, 4, 16, (1, 16, 16)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def domain_batch(step: int, domain: int, here: int = 0, world: int = 1) -> DomainBatch:
    """One rank's part of a fixed global batch, with views drawn as in training; the target has no labels."""
    n = CLASSES * PER_CLASS
    x = torch.randint(0, 256, (n, *SHAPE), generator=seeded_generator(7, step, domain), dtype=torch.uint8)
    share = slice(here * n // world, (here + 1) * n // world)
    with precision(torch.float32):
        views = tuple(random_view(x[share], seeded_generator(step, domain, each), here, world) for each in range(2))
    return DomainBatch(x[share], views, None if domain else torch.arange(CLASSES).repeat(PER_CLASS)[share], torch.arange(n)[share])


def global_batch(step: int) -> Batch:
    """A batch of both domains for one process."""
    return Batch(domain_batch(step, 0), domain_batch(step, 1))


@dataclass
class Fixed:
    """Fixed batches in place of a dataset's."""

    domain: int
    total: int = CLASSES * PER_CLASS

    def rows(self) -> Iterator[DomainBatch]:
        """This rank's rows."""
        yield domain_batch(0, self.domain, rank(), world_size())._replace(views=())

    def epoch(self, epoch: int, steps: int, first: int = 0) -> Iterator[DomainBatch]:
        """This rank's part of the epoch's batches."""
        for step in range(first, steps):
            yield domain_batch(epoch * steps + step, self.domain, rank(), world_size())

    def with_views(self, batch: DomainBatch, epoch: int, step: int) -> DomainBatch:
        """The batch, which has its views."""
        return batch


@dataclass
class Recorder(Trainer):
    """A trainer that records the gradients of each player's first step of each epoch."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    stop: int = 0

    def step(self, name: str, batch: Batch) -> dict[str, Tensor]:
        if self.stop and self.epoch == self.stop:
            raise InterruptedError
        terms = super().step(name, batch)
        named = self.method.players[name].networks.named_parameters()
        found = {f"epoch {self.epoch}: {name}.{each}": p.grad.clone() for each, p in named if p.grad is not None}
        self.gradients = found | self.gradients
        return terms


def build(name: str, **own: Any) -> Method:
    """A small method with fixed parameters."""
    kind = find_method(name)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    usual = {"per_class": PER_CLASS} if hasattr(kind.Config, "per_class") else {}
    return kind(kind.Config(**usual | own), SHAPE, CLASSES, BITS)


def trained(name: str, own: dict[str, Any], folder: Path, epochs: int = 2, steps: int = 2) -> dict[str, Tensor]:
    """Gradients of each player and the final checkpointed state, in double precision; of what is divided, ranks but the first have their part.

    ``own`` may have, beside the method's options, ``stop``: a first training is cut off in that epoch, and a second continues from its checkpoint.
    """
    sources: list[Any] = [Fixed(0), Fixed(1)]
    options = {key: value for key, value in own.items() if key != "stop"}
    with precision(torch.float64):
        for stop in (own["stop"], 0) if "stop" in own else (0,):
            method = build(name, **options)
            trainer = Recorder(method, *sources, epochs, steps, 0, folder / "checkpoints", {}, lambda record: None, stop=stop)
            with contextlib.suppress(InterruptedError):
                trainer.fit()
    return trainer.gradients | {f"kept {each}": tensor for each, tensor in copy.deepcopy(method.whole_state()).items()}


def _worker(here: int, world: int, folder: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=here, world_size=world)
    torch.save([trained(name, own, Path(folder) / str(i)) for i, (name, own) in enumerate(cases.values())], f"{folder}/{here}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained_by_two(cases: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    """The same with the batches shared by two processes: a result of each process for each case."""
    mp.spawn(_worker, (2, str(folder), cases), nprocs=2)
    results = [torch.load(folder / f"{here}.pt", weights_only=True) for here in range(2)]
    return {case: list(pair) for case, pair in zip(cases, zip(*results, strict=True), strict=True)}
