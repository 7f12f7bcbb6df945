"""Measures how the time of training steps divides into named parts, where ``--profile`` asks for it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Clock:
    """Adds up the seconds of named parts. The time of a part within another counts for the inner one alone.

    Attributes:
        seconds: of each part so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.open: list[str] = []
        self.since = 0.0

    def _pass_on(self) -> None:
        """Count the time since the last change for the innermost open part; on a GPU after it has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time counts for a part."""
        self._pass_on()
        self.open.append(name)
        try:
            yield
        finally:
            self._pass_on()
            self.open.pop()

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in self.seconds.items())


_running: list[Clock] = []


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    """Let ``part`` count for a clock within a block."""
    _running.append(clock)
    try:
        yield
    finally:
        _running.pop()


def part(name: str) -> AbstractContextManager[None]:
    """A context whose time counts for a part of the running clock; it costs nothing where none runs."""
    return _running[-1].part(name) if _running else nullcontext()
