"""The training loop: a method, its batches, a reporter. Runs in a plain process, under torchrun and in Ray Train alike."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import DomainSource
from models.distributed import mean_over_ranks, rank, world_size
from models.method import Batch, Method
from pipelines import checkpoint

Reporter = Callable[[dict[str, Any]], None]


class PlayerStep(nn.Module):
    """One player's networks as a module whose forward is its loss: what DDP wraps.

    The method is held outside the module tree, so that the parameters here are this player's alone.
    """

    def __init__(self, method: Method, player: str) -> None:
        super().__init__()
        self.networks = method.players[player].networks
        self._step: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]] = lambda batch: method.loss(player, batch)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (scalar) and its terms."""
        return self._step(batch)


@dataclass
class Trainer:
    """Trains a method on two sources of batches; restores itself from the folder's latest checkpoint.

    Attributes:
        source, target: batches of the domains, None where the method wants none.
        folder: where checkpoints go.
        config: what the checkpoint says of the run.
        report: takes a record of each finished epoch; called on rank 0 alone.
    """

    method: Method
    source: DomainSource | None
    target: DomainSource | None
    epochs: int
    steps: int
    seed: int
    folder: Path
    config: dict[str, Any]
    report: Reporter
    device: torch.device = torch.device("cpu")
    keep_checkpoints: int = 2
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        self.place = checkpoint.latest(self.folder)
        self.epoch = checkpoint.load(self.place, self.method) if self.place else 0
        self.method.to(self.device)
        self.steppers: dict[str, nn.Module] = {}
        for name, player in self.method.players.items():
            step = PlayerStep(self.method, name)
            trained = any(p.requires_grad for p in player.networks.parameters())
            if world_size() > 1 and trained:
                self.steppers[name] = DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=player.partial)
            else:
                self.steppers[name] = step

    def fit(self) -> Path:
        """Train the epochs that are left.

        Returns:
            The last checkpoint's folder.

        Raises:
            FloatingPointError: a loss is not finite or a player has collapsed; the last checkpoint is kept.
        """
        if not self.epoch:
            self.method.begin(self.source, self.target)
        while self.epoch < self.epochs:
            record = self._epoch()
            self.epoch += 1
            last = self.epoch == self.epochs
            if rank() == 0 and (last or self.epoch % self.checkpoint_every == 0):
                self.place = checkpoint.save(self.folder, self.method, self.epoch, self.config)
                checkpoint.prune(self.folder, self.keep_checkpoints)
            if world_size() > 1:
                dist.barrier()
            if rank() == 0:
                self.report(record)
        return self.place or self.folder

    def _batches(self) -> Iterator[Batch]:
        source = self.source.epoch(self.epoch, self.steps) if self.source else [None] * self.steps
        target = self.target.epoch(self.epoch, self.steps) if self.target else [None] * self.steps
        for s, t in zip(source, target, strict=True):
            yield Batch(s and s.to(self.device), t and t.to(self.device))

    def _epoch(self) -> dict[str, Any]:
        """Train one epoch; its mean terms, time and speed."""
        torch.manual_seed(self.seed * 1_000_003 + self.epoch * 1009 + rank())
        self.method.train()
        self.method.begin_epoch(self.epoch, self.epochs)
        start, images = time.perf_counter(), 0
        sums: dict[str, Tensor] = {}
        for step, batch in enumerate(self._batches()):
            self.method.begin_step((self.epoch + step / self.steps) / self.epochs)
            for name in filter(self.method.plays, self.steppers):
                for term, value in self.step(name, batch).items():
                    sums[term] = sums.get(term, torch.zeros((), device=self.device)) + value
            self.method.end_step()
            images += sum(len(part.x) for part in batch if part is not None)
        means = mean_over_ranks(torch.stack([*sums.values()])) / self.steps if sums else torch.empty(0)
        terms = dict(zip(sums, means.tolist(), strict=True))
        self._check(terms)
        seconds = time.perf_counter() - start
        speed = images * world_size() / seconds
        return {"epoch": self.epoch + 1, "epochs": self.epochs, "terms": terms, "seconds": seconds, "images_per_second": speed}

    def _check(self, terms: dict[str, float]) -> None:
        """Raise where an epoch's mean terms, which all ranks have alike, say that training has failed."""
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        failure = f"loss {', '.join(broken)} is not finite: lower the learning rate" if broken else self.method.failure(terms)
        if failure:
            kept = f"checkpoints up to epoch {self.epoch} are kept in {self.folder}" if self.epoch else "no epoch was done before it"
            raise FloatingPointError(f"{self.method.name} failed in epoch {self.epoch + 1}: {failure}; {kept}")

    def step(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of a player; its detached terms. The other players' parameters take no gradient."""
        others = [p for other, player in self.method.players.items() if other != name for p in player.networks.parameters()]
        optimizer = self.method.players[name].optimizer
        with frozen(others) if others else nullcontext():
            optimizer.zero_grad(set_to_none=True)
            loss, terms = self.steppers[name](batch)
            loss.backward()
            optimizer.step()
        return {term: value.detach() for term, value in terms.items()} | {f"{name} loss": loss.detach()}


class frozen:  # noqa: N801  reads as a statement: with frozen(parameters)
    """Context in which parameters take no gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
