"""What UCDIR's memory slots cost each worker: bytes, peak memory, seconds a step and a clustering, by images per domain.

Run: python -m tests.benchmarks.slots [--images 10000,100000,1000000] [--workers 1] [--batch 128] [--steps 10] [--threads 1]
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import multiprocessing

from data.rows import DomainBatch
from models.distributed import own_rows
from models.method import Batch
from models.methods.memory_contrast import DOMAINS, WIDTH
from models.methods.ucdir import UCDIR, UCDIRConfig

SHAPE, CLASSES, BITS = (1, 28, 28), 10, 64


@dataclass
class Made:
    """A worker's rows of a domain, made as they are asked for; its encoded rows have their slots set by hand."""

    total: int

    def rows(self) -> Iterator[DomainBatch]:
        """One batch."""
        yield self.batch(512)

    def batch(self, size: int) -> DomainBatch:
        """Random images with two views."""
        x = torch.randint(0, 256, (size, *SHAPE), dtype=torch.uint8)
        return DomainBatch(x, (x.float(), x.float()), None, torch.randint(*own_rows(self.total), (size,)))


def peak() -> float:
    """This process's largest resident memory so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


def measure(here: int, images: int, given: argparse.Namespace, folder: str) -> None:
    """Print one line; run in processes of their own, whose peak memory is then that size's alone."""
    torch.set_num_threads(given.threads)
    if given.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{images}", rank=here, world_size=given.workers)
    torch.manual_seed(0)
    method = UCDIR(UCDIRConfig(), SHAPE, CLASSES, BITS).train()
    domain = Made(images)
    method.begin(domain, domain)
    before = peak()
    first, stop = own_rows(images)
    centres = torch.randn(CLASSES, WIDTH)
    for name in DOMAINS:
        slots = torch.randn(stop - first, WIDTH)
        for part in slots.split(CLASSES * 1000):
            part += centres.repeat(1000, 1)[: len(part)]
            part /= part.norm(dim=1, keepdim=True)
        method.memory[name].fill(slots, images)
    start = time.perf_counter()
    method.clustering, method.aligning = method.config.cluster_weight, True  # all terms on
    for memory in method.memory.values():
        memory.cluster(memory.slots, method.draw())
    clustered = time.perf_counter() - start
    player, times = method.players["encoder"], []
    for _ in range(given.steps):
        drawn = Batch(domain.batch(given.batch // given.workers), domain.batch(given.batch // given.workers))
        start = time.perf_counter()
        player.optimizer.zero_grad(set_to_none=True)
        method.loss("encoder", drawn)[0].backward()
        player.optimizer.step()
        method.end_step()
        times.append(time.perf_counter() - start)
    held = sum(memory.slots.nbytes for memory in method.memory.values()) / 1e9
    if not here:
        print(f"{images:>16,}{held:>12.3f}{before:>14.2f}{peak():>14.2f}{clustered:>12.1f}{statistics.median(times):>12.3f}", flush=True)
    if given.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    """Print a line for each size: the first worker's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="10000,100000,1000000")
    for option, default in {"workers": 1, "batch": 128, "steps": 10, "threads": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    print(f"{'images a domain':>16}{'slots GB':>12}{'peak before':>14}{'peak GB':>14}{'cluster s':>12}{'step s':>12}")
    for images in map(int, given.images.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measure, (images, given, folder), nprocs=given.workers)


if __name__ == "__main__":
    main()
