"""Keeps memory that tensors have freed, where the C library gives it back to the system too eagerly."""

import contextlib
import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt in glibc's malloc.h
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors that it has freed.

    By default glibc returns it to the system, which hands out each page anew, filled with zeros, in the next step. MobileNetV2 at 96 pixels
    trains a third faster without (``python -m tests.benchmarks.feeding --parts allocator``). Memory stays with the process, and its peak
    was an eighth higher when photographs were encoded. Nothing changes with another C library, or if the user has chosen a policy or an
    allocator by one of ``VARIABLES``.
    """
    if not set(VARIABLES) & set(os.environ):
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_THRESHOLD, 2**30)
            mallopt(TRIM_THRESHOLD, 2**31 - 1)
