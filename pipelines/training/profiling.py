"""Profiles training steps: how their time divides, and a trace of the first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from data.filesystem import atomic_write
from models.clock import Clock, running
from models.distributed import rank

Item = TypeVar("Item")
UNTRACED, TRACED = 2, 5  # steps before a trace, and of it


def profiled(batches: Iterator[Item], device: torch.device, place: Path, tell: Callable[[str], None]) -> Iterator[Item]:
    """The same batches. When they end, rank 0 tells how the time of the steps divided and writes a trace of the first steps.

    Args:
        device: where the steps run; with a GPU each part waits until it has done its work, so steps take longer than without a profile.
        place: file of the trace, in the format of chrome://tracing and Perfetto.
        tell: receives the line.
    """
    clock, steps = Clock(device), 0
    schedule = torch.profiler.schedule(wait=UNTRACED - 1, warmup=1, active=TRACED, repeat=1)
    with running(clock), torch.profiler.profile(schedule=schedule) as profiler:
        while True:
            with clock.part("waiting for data"):
                item = next(batches, None)
            if item is None:
                break
            yield item
            steps += 1
            profiler.step()
    if rank() == 0:
        traced = min(TRACED, max(0, steps - UNTRACED))
        if traced:
            with atomic_write(place) as file:
                profiler.export_chrome_trace(str(file))
        seconds = sum(clock.seconds.values()) / max(1, steps)
        where = f"trace of {traced} steps: {place}" if traced else f"too few steps for a trace: more than {UNTRACED} are needed"
        tell(f"a step takes {1000 * seconds:.1f} ms: {clock}; {where}")
