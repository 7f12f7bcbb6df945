"""The training loop, independent of Ray: it runs in a plain process, under torchrun and in Ray Train workers."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import DomainLoader
from data.transforms import seeded_generator
from models.clock import part
from models.distributed import gather, mean_over_ranks, rank, world_size
from models.method import Batch, Method
from pipelines.training import checkpoint
from pipelines.training.profiling import profiled
from pipelines.training.transfer import on_device

LOOK = 5  # steps between checks of the clock
Reporter = Callable[[dict[str, Any]], None]


class PlayerStep(nn.Module):
    """One player's networks as a module whose forward returns its loss; DDP wraps this module.

    The method is kept outside the module tree, so the module's parameters are only this player's.
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
    """Trains a method on batches of two domains. The constructor restores the latest checkpoint of the folder.

    Attributes:
        source, target: loaders of the domains; None if the method does not use the domain.
        folder: folder for checkpoints.
        config: the run's options, saved in the checkpoints.
        report: called on rank 0 with the record of each finished epoch.
        checkpoint_steps: steps between checkpoints within an epoch, written in the background; 0 for none.
        checkpoint_seconds: seconds between checkpoints within an epoch, checked every ``LOOK`` steps; 0 for none.
        keep_checkpoints: number of checkpoints kept.
        profile: whether each record says how the epoch's time divided, and a trace of its first steps is written.
    """

    method: Method
    source: DomainLoader | None
    target: DomainLoader | None
    epochs: int
    steps: int
    seed: int
    folder: Path
    config: dict[str, Any]
    report: Reporter
    device: torch.device = torch.device("cpu")
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 0
    keep_checkpoints: int = 2
    profile: bool = False

    def __post_init__(self) -> None:
        self.method.to(self.device)  # before loading: optimisers take their state to where the parameters are
        self.place = checkpoint.latest(self.folder)
        self.epoch, self.first, self.loop = checkpoint.load(self.place, self.method) if self.place else checkpoint.Position(0, 0, {})
        if self.place and self.first:
            self.method.start_epoch(self.epoch, self.epochs, self.source, self.target)  # what it draws and computes is overwritten from the checkpoint
            checkpoint.load(self.place, self.method)
        self.writer, self.writing = ThreadPoolExecutor(1), Future[Path]()
        self.writing.set_result(self.place or self.folder)
        self.written = time.monotonic()
        self.steppers: dict[str, nn.Module] = {}
        self.told: list[str] = []
        for name, player in self.method.players.items():
            step = PlayerStep(self.method, name)
            trained = any(p.requires_grad for p in player.networks.parameters())
            if world_size() > 1 and trained:
                self.steppers[name] = DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=player.partial)
            else:
                self.steppers[name] = step

    def fit(self) -> Path:
        """Train the remaining epochs.

        Returns:
            The folder of the last checkpoint.

        Raises:
            FloatingPointError: a loss is not finite or a player has collapsed; the last checkpoint is kept.
        """
        if not self.place:
            self.method.begin(self.source, self.target)
        while self.epoch < self.epochs:
            record = self._epoch()
            self.epoch += 1
            self._save()
            self.writing.result()
            if world_size() > 1:
                dist.barrier()
            if rank() == 0:
                self.report(record)
        return self.writing.result()

    def _save(self, step: int = 0, loop: dict[str, Any] | None = None) -> None:
        """Start writing a checkpoint on rank 0, after the previous one has been written.

        Raises:
            OSError: the previous one could not be written.
        """
        self.written = time.monotonic()
        if rank() == 0:
            self.writing.result()
            self.writing = self.writer.submit(self._write, checkpoint.snapshot(self.method, self.epoch, self.config, step, loop))
        else:
            self.method.whole_state()  # sends this rank's part to rank 0

    def _write(self, taken: checkpoint.Snapshot) -> Path:
        place = checkpoint.write(self.folder, taken)
        checkpoint.prune(self.folder, self.keep_checkpoints)
        return place

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """The remaining steps of the epoch with their batches, on the device, with their views."""
        loaders, rest = (self.source, self.target), self.steps - self.first
        drawn = [each.epoch(self.epoch, self.steps, self.first) if each else [None] * rest for each in loaders]
        for step, pair in enumerate(on_device(zip(*drawn, strict=True), self.device), self.first):
            with part("views"):
                batch = Batch(*(each.with_views(rows, self.epoch, step) if each and rows else None for each, rows in zip(loaders, pair, strict=True)))
            yield step, batch

    def _profiled(self) -> Iterator[tuple[int, Batch]]:
        place = self.folder.parent / "profile" / f"epoch-{self.epoch + 1:05d}.json"
        return profiled(self._batches(), self.device, place, self.told.append) if self.profile else self._batches()

    def _epoch(self) -> dict[str, Any]:
        """Train one epoch, or the rest of one; returns its mean terms, time and speed."""
        torch.manual_seed(seeded_generator(self.seed, self.epoch, rank()).initial_seed())
        self.method.train()
        sums: dict[str, Tensor] = {}
        images, before = 0, 0.0
        if self.first:
            sums, images, before = self._rejoin()
        else:
            self.method.start_epoch(self.epoch, self.epochs, self.source, self.target)
        start = time.perf_counter()
        for step, batch in self._profiled():
            self.method.begin_step((self.epoch + step / self.steps) / self.epochs)
            for name in filter(self.method.is_active, self.steppers):
                for term, value in self.step(name, batch).items():
                    sums[term] = sums.get(term, torch.zeros((), device=self.device)) + value
            with part("optimiser"):
                self.method.end_step()
            images += sum(len(part.x) for part in batch if part is not None)
            if step + 1 < self.steps and self._due(step + 1):
                self._checkpoint(step + 1, sums, images, before + time.perf_counter() - start)
        self.first = 0
        terms = self._means(sums, self.steps)
        self._check(terms)
        seconds = before + time.perf_counter() - start
        speed = images * world_size() / seconds
        record = {"epoch": self.epoch + 1, "epochs": self.epochs, "terms": terms, "seconds": seconds, "images_per_second": speed}
        return record | ({"profile": self.told.pop()} if self.told else {})

    def _due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step. Ranks agree, because they use the mean of their clocks."""
        if self.checkpoint_seconds and step % LOOK == 0:
            since = mean_over_ranks(torch.tensor(time.monotonic() - self.written, device=self.device))
            if float(since) >= self.checkpoint_seconds:
                return True
        return bool(self.checkpoint_steps) and step % self.checkpoint_steps == 0

    def _means(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means of the terms over the epoch's steps so far and over the ranks."""
        means = mean_over_ranks(torch.stack([*sums.values()])) / steps if sums else torch.empty(0)
        return dict(zip(sums, means.tolist(), strict=True))

    def _checkpoint(self, step: int, sums: dict[str, Tensor], images: int, seconds: float) -> None:
        """Write a checkpoint within an epoch, with every rank's sums and random state and the method's counters, unless training has failed."""
        self._check(self._means(sums, step))
        drawn = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
        counters = {name: value for name, value in vars(self.method).items() if isinstance(value, int | float)}
        loop = {
            "terms": list(sums), "sums": gather(torch.stack([*sums.values()]).unsqueeze(0)), "random": gather(drawn.to(self.device).unsqueeze(0)),
            "images": images, "seconds": seconds, "counters": counters,
        }  # fmt: skip
        self._save(step, loop)

    def _rejoin(self) -> tuple[dict[str, Tensor], int, float]:
        """Restore sums, images and seconds of an unfinished epoch, and each rank's random state if the number of ranks is the same."""
        loop, world = self.loop, len(self.loop["sums"])
        for name, value in loop["counters"].items():
            setattr(self.method, name, value)
        if world == world_size():
            drawn = loop["random"][rank()].cpu().clone()  # torch ignores the offset of a view
            torch.cuda.set_rng_state(drawn, self.device) if self.device.type == "cuda" else torch.set_rng_state(drawn)
        sums = loop["sums"][rank()] if world == world_size() else loop["sums"].mean(0)
        return dict(zip(loop["terms"], sums.to(self.device).unbind(), strict=True)), loop["images"] * world // world_size(), loop["seconds"]

    def _check(self, terms: dict[str, float]) -> None:
        """Raise if an epoch's mean terms, which are equal on all ranks, show that training has failed."""
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        failure = f"loss {', '.join(broken)} is not finite: lower the learning rate" if broken else self.method.failure(terms)
        if failure:
            kept = f"checkpoints up to epoch {self.epoch} are kept in {self.folder}" if self.epoch else "no epoch was done before it"
            raise FloatingPointError(f"{self.method.name} failed in epoch {self.epoch + 1}: {failure}; {kept}")

    def step(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step of a player; returns its detached terms. The other players' parameters receive no gradient."""
        others = [p for other, player in self.method.players.items() if other != name for p in player.networks.parameters()]
        optimizer = self.method.players[name].optimizer
        with frozen(others) if others else nullcontext():
            optimizer.zero_grad(set_to_none=True)
            with part("forward"):
                loss, terms = self.steppers[name](batch)
            with part("backward"):
                loss.backward()
            with part("optimiser"):
                optimizer.step()
        return {term: value.detach() for term, value in terms.items()} | {f"{name} loss": loss.detach()}


class frozen:  # noqa: N801  reads as a statement: with frozen(parameters)
    """Context manager in which parameters receive no gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
