"""A process that decodes images for one thread of ``data.decoding``.

Decoding holds Python's global lock for a fifth of its time, so the threads of one process decode no faster than some four cores.
The process imports no torch. It ends with the process that started it.
"""

import math
import mmap
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from data.images import decode_rows

SERVE = "import sys; from data.decoder_process import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


class DecoderProcess:
    """The process, as the thread that starts it sees it. Pixels come back through memory that both share."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("decoded")
        self.mapped: mmap.mmap | None = None
        self.connection, theirs = Pipe()
        given = [theirs.fileno(), self.memory]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SERVE, *map(str, given)]
        self.process = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, env=environment)
        theirs.close()

    @property
    def died(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def decode(self, contents: list[bytes], pixels: np.ndarray) -> tuple[int, str] | None:
        """Decode images as ``decode_rows`` does.

        Args:
            contents: the files' bytes.
            pixels: (n, size, size) or (n, size, size, 3) uint8, filled.

        Returns:
            None; or the position of an image that cannot be decoded, and why.

        Raises:
            ChildProcessError: the process has died.
        """
        header = [pixels.shape[1], pixels.ndim, *map(len, contents)]
        try:
            shared = self._shared(pixels.nbytes)
            self.connection.send_bytes(np.array(header, np.int64).tobytes())
            self.connection.send_bytes(b"".join(contents))
            answer = self.connection.recv_bytes().decode()
        except (EOFError, OSError) as error:
            self.process.kill()  # it may be alive, if this end has failed
            raise ChildProcessError(
                f"a process that decodes images has died (exit code {self.process.wait()}), perhaps as memory ran out: give fewer --decoders"
            ) from error
        if answer:
            position, _, why = answer.partition(" ")
            return int(position), why
        pixels[...] = np.frombuffer(shared, np.uint8, pixels.size).reshape(pixels.shape)
        return None

    def _shared(self, size: int) -> mmap.mmap:
        """The shared memory, of at least ``size`` bytes; mapped once, as each unmapping interrupts all of the process's threads."""
        if self.mapped is None or len(self.mapped) < size:
            os.ftruncate(self.memory, size)
            self.mapped = mmap.mmap(self.memory, size)
        return self.mapped

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.wait()
        os.close(self.memory)


def serve(connection: int, memory: int) -> None:
    """Decode what arrives until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asks, and that ends this one
    asked, shared = Connection(connection), np.empty(0, np.uint8)
    while True:
        try:
            size, axes, *lengths = np.frombuffer(asked.recv_bytes(), np.int64).tolist()
            joined, shape = asked.recv_bytes(), (len(lengths), size, size, 3)[:axes]
            if len(shared) < math.prod(shape):
                shared = np.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), np.uint8)
            asked.send_bytes(_decode(joined, lengths, shared[: math.prod(shape)].reshape(shape)).encode())
        except (EOFError, OSError):
            return


def _decode(joined: bytes, lengths: list[int], pixels: np.ndarray) -> str:
    """Decode images into the shared memory; returns "" or the position of one that cannot be decoded, and why."""
    start = 0
    for position, length in enumerate(lengths):
        try:
            pixels[position] = decode_rows(joined[start : start + length], 3 if pixels.ndim == 4 else 1, pixels.shape[1])
        except ValueError as error:
            return f"{position} {error}"
        start += length
    return ""
