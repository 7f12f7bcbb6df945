"""Time of IDR-AE's matching term against the critic's and the assignment's, alone and in a whole training step, by batch size.

Run: python -m tests.benchmarks.matching [--bits 64] [--batches 128,512,2048] [--rounds 5] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from data.rows import DomainBatch
from models.method import Batch
from models.methods.idr_ae import IDRAE, IDRAEConfig

WAYS = {"IDR": "bitwise", "critic": "critic", "OT": "assignment"}


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def times(matching: str, bits: int, batch: int, rounds: int) -> tuple[float, float]:
    """Seconds of the matching term with its gradient (the critic's with its own step), and of a training step, on MNIST's 784 pixels."""
    torch.manual_seed(0)
    method = IDRAE(IDRAEConfig(matching=matching), (784,), 10, bits).train()
    x = torch.rand(batch, 784)
    drawn = Batch(None, DomainBatch(x, (), None, torch.arange(batch)))
    codes = method.networks["encoder"](x).detach()  # as the training starts: random ones are assigned far sooner

    def optimise(player: str, loss: Callable[[], Tensor]) -> None:
        method.players[player].optimizer.zero_grad(set_to_none=True)
        loss().backward()
        method.players[player].optimizer.step()

    def term() -> None:
        method._matching(codes.clone().requires_grad_()).backward()
        if matching == "critic":
            optimise("critic", lambda: method.loss("critic", drawn)[0])

    def step() -> None:
        for player in method.players:
            optimise(player, lambda player=player: method.loss(player, drawn)[0])  # type: ignore[misc]
        method.end_step()

    return seconds(term, rounds), seconds(step, rounds)


def main() -> None:
    """Print the times, their ratios to IDR's, and their growth from one batch size to the next."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in {"bits": 64, "rounds": 5, "threads": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--batches", default="128,512,2048")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    batches = [int(each) for each in given.batches.split(",")]
    found = {batch: {name: times(way, given.bits, batch, given.rounds) for name, way in WAYS.items()} for batch in batches}
    for part, what in enumerate(("matching term with its gradient", "training step")):
        print(f"\n{what}, {given.bits} bits, {given.threads} thread: milliseconds (times IDR's; times that of the batch before)")
        print(f"{'batch':>7}" + "".join(f"{name:>30}" for name in WAYS))
        for before, batch in zip([None, *batches], batches, strict=False):
            cells = []
            for name in WAYS:
                mine, own = found[batch][name][part], found[batch]["IDR"][part]
                growth = f"; {mine / found[before][name][part]:.1f}" if before else ""
                cells.append(f"{1000 * mine:>12.2f} ({mine / own:.1f}{growth})".rjust(30))
            print(f"{batch:>7}" + "".join(cells))


if __name__ == "__main__":
    main()
