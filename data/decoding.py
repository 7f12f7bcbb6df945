"""Turns stored rows into arrays: images are decoded in parallel threads, some batches ahead of their use.

Files that ``ingest --store jpeg`` has written need no conversion: simplejpeg decodes them, to Pillow's pixels in about half of its time, and
outside Python's global lock. Pillow decodes all others, outside the lock for four fifths of its time: up to ``ALONE`` threads decode
themselves, and of more threads each has a process that decodes for it.
"""

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
import torch
from torch import Tensor

from data.decoder_process import DecoderProcess
from data.images import decode_query, decode_rows
from data.manifest import Manifest
from data.shards import ROWS_READ, read_rows

AHEAD = 4  # batches that are decoded before they are asked for
TASK = 8  # images that a thread decodes at a time, at least
ALONE = 4  # threads of one process that scale with Pillow: on 16 cores 4 gave 3.1 times the images of one, 8 gave 3.9, 16 gave 3.2
NICE = 10  # how much lower the priority of decoding threads is
VALUES, ROWS = 2**23, 512  # values and rows of a batch of ``read_decoded`` at most
GPU_BATCHES = 4  # a GPU takes so many of these batches at once
Item = TypeVar("Item")


class Decoded(NamedTuple):
    """A batch of rows: ``x`` (n, ...) as stored, ``row`` (n,), ``label`` (n,) int64 or None, ``id`` or None."""

    x: Tensor
    row: np.ndarray
    label: np.ndarray | None
    id: list[str] | None

    @property
    def labels(self) -> np.ndarray:
        """``label`` of rows that were read with labels."""
        assert self.label is not None
        return self.label


def split_name(name: str) -> tuple[str, str]:
    """Domain and split of DOMAIN/SPLIT."""
    domain, _, split = name.rpartition("/")
    return domain, split


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """The process's decoding threads, which all readers share. They yield to the training's threads, which wait for each other."""
    return ThreadPoolExecutor(threads, "decoder", initializer=_yield_to_others)


class _Processes(threading.local):
    """The decoding process of each thread."""

    one: DecoderProcess | None = None

    def own(self) -> DecoderProcess:
        """The calling thread's process, started anew if there is none, or it has died."""
        if self.one is not None and self.one.died:
            atexit.unregister(self.one.close)
            self.one.close()
            self.one = None
        if self.one is None:
            self.one = DecoderProcess()
            atexit.register(self.one.close)
        return self.one


_processes = _Processes()


def _yield_to_others() -> None:
    """Lower this thread's priority, where the system has one for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE))


class Decoder:
    """Turns rows as stored into tensors.

    Attributes:
        threads: decoding threads, above ``ALONE`` of them with a process each where Pillow decodes; 0 decodes in the thread that asks.
        pinned: whether the tensors lie in page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(self, manifest: Manifest, threads: int | None = None, pinned: bool = False) -> None:
        self.shape, self.store, self.pinned = tuple(manifest.shape), manifest.store, pinned
        self.threads = (usable_cores() if threads is None else threads) if manifest.compressed else 0

    def __call__(self, content: np.ndarray, row: np.ndarray) -> Tensor:
        """Decode rows.

        Args:
            content: (n,) objects, each the bytes of an image; or (n, features) float32.
            row: (n,) their numbers, for messages.

        Returns:
            (n, channels, h, w) uint8 or (n, features) float32.

        Raises:
            ValueError: an image cannot be decoded.
        """
        return self.start(content, row)()

    def start(self, content: np.ndarray, row: np.ndarray) -> Callable[[], Tensor]:
        """Begin to decode rows; the returned function waits for the tensor."""
        if self.store == "feature":
            return lambda: self._placed(torch.from_numpy(content.copy()))
        if self.store == "raw":
            pixels = np.frombuffer(bytearray().join(content), np.uint8)
            return lambda: self._placed(torch.from_numpy(pixels.reshape(-1, *self.shape)))
        channels, size = self.shape[:2]
        apart = self.store != "jpeg" and self.threads > ALONE and sys.platform == "linux"  # where processes share memory that has no name
        task = max(TASK, AHEAD * len(content) // self.threads) if apart else TASK  # each message to a process holds up the training thread
        made = torch.empty(len(content), size, size, channels, dtype=torch.uint8, pin_memory=self.pinned)
        pixels = made.numpy() if channels == 3 else made.squeeze(3).numpy()

        def fill(start: int) -> None:
            part = slice(start, start + task)
            failed = _processes.own().decode(content[part].tolist(), pixels[part]) if apart else self._fill(content[part], pixels[part])
            if failed:
                raise ValueError(f"the image of row {row[start + failed[0]]} cannot be decoded ({failed[1]}): ingest the domain again")

        starts = range(0, len(content), task)
        tasks = [_pool(self.threads).submit(fill, start) for start in starts] if self.threads else []

        def wait() -> Tensor:
            for task in tasks:
                task.result()
            if not tasks:
                for start in starts:
                    fill(start)
            return made.permute(0, 3, 1, 2)

        return wait

    def _fill(self, content: np.ndarray, pixels: np.ndarray) -> tuple[int, str] | None:
        """Decode images here, as ``DecoderProcess.decode`` does in another process."""
        for i, each in enumerate(content):
            try:
                if self.store == "jpeg":
                    _decode_own(each, pixels[i])
                else:
                    pixels[i] = decode_rows(each, *self.shape[:2])
            except ValueError as error:
                return i, str(error)
        return None

    def _placed(self, made: Tensor) -> Tensor:
        return made.pin_memory() if self.pinned else made

    def ahead(self, batches: Iterable[Item], stored: Callable[[Item], tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[Item, Tensor]]:
        """Pair each of several batches with its tensor, in their order, decoded ``AHEAD`` batches before it is asked for.

        Args:
            batches: consumed by one other thread, so that reading files does not hold up training either.
            stored: the content and row numbers of a batch.
        """
        if not self.threads:
            for batch in batches:
                yield batch, self(*stored(batch))
            return
        drawn = iter(batches)

        def begin() -> tuple[Item, Callable[[], Tensor]] | None:
            for batch in drawn:
                return batch, self.start(*stored(batch))
            return None

        reader = ThreadPoolExecutor(1, "reader")
        try:
            waiting = deque(reader.submit(begin) for _ in range(AHEAD))
            while (begun := waiting.popleft().result()) is not None:
                waiting.append(reader.submit(begin))
                yield begun[0], begun[1]()
        finally:
            reader.shutdown(cancel_futures=True)


def _decode_own(content: bytes, pixels: np.ndarray) -> None:
    """Decode a JPEG file of the dataset's size and colours, without rotation.

    Args:
        pixels: (size, size) or (size, size, 3) uint8, filled.

    Raises:
        ValueError: the bytes are no such file; says why.
    """
    if not content:
        raise ValueError("empty file")
    size, colours = len(pixels), "RGB" if pixels.ndim == 3 else "GRAY"
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    if (height, width) != (size, size):
        raise ValueError(f"{width}x{height} pixels in a dataset of {size}x{size}")
    simplejpeg.decode_jpeg(content, colours, buffer=pixels)


def stored_content(batch: pa.RecordBatch | pa.Table, manifest: Manifest) -> np.ndarray:
    """The rows of a record batch as stored: (n,) objects, each the bytes of an image, or (n, features) float32, with those of views if they were read."""
    if manifest.store == "feature":
        columns = [batch.column(name) for name in ("feature", "views") if name in batch.schema.names]
        flat = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
        parts: list[np.ndarray] = [column.flatten().to_numpy().reshape(len(batch), -1) for column in flat]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
    content = np.empty(len(batch), object)
    content[:] = batch.column("image").to_pylist()
    return content


def read_decoded(
    root: Path, manifest: Manifest, domain: str, split: str, start: int = 0, stop: int | None = None, *,
    labels: bool = True, ids: bool = False, threads: int | None = None, gpu: bool = False,
) -> Iterator[Decoded]:  # fmt: skip
    """Read the rows ``start`` to ``stop`` of a split in batches that are decoded ahead; memory does not grow with their number.

    All batches but the last have the same size, at most ``ROWS`` rows and ``VALUES`` values.

    Args:
        threads: as in ``Decoder``; one a core if None.
        gpu: whether a GPU takes them: in page-locked memory, and ``GPU_BATCHES`` times as many at once.
    """
    size = batch_rows(tuple(manifest.shape)) * (GPU_BATCHES if gpu else 1)
    tables = _rebatched(read_rows(root, manifest, domain, split, start, stop, labels=labels, ids=ids), size)
    decoder = Decoder(manifest, threads, gpu)
    for table, x in decoder.ahead(tables, lambda table: (stored_content(table, manifest), table.column("row").to_numpy())):
        label = table.column("label").to_numpy().astype(np.int64) if labels else None
        yield Decoded(x, table.column("row").to_numpy(), label, table.column("id").to_pylist() if ids else None)


def batch_rows(shape: tuple[int, ...]) -> int:
    """Rows of a batch that is encoded at once, of rows of a shape."""
    return max(1, min(ROWS, VALUES // int(np.prod(shape))))


def _rebatched(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Cut consecutive record batches anew into tables of ``size`` rows; the last may be smaller."""
    held: Any = None
    for batch in batches:
        part = pa.Table.from_batches([batch])
        held = part if held is None else pa.concat_tables([held, part])
        while len(held) >= size:
            yield held.slice(0, size)
            held = held.slice(size)
    if held is not None and len(held):
        yield held


def decode_files(
    paths: Iterable[Path], shape: tuple[int, ...], threads: int | None = None, values: tuple[float, float] | None = None,
    whites: list[float] | None = None,
) -> Iterator[np.ndarray | ValueError]:  # fmt: skip
    """Decode image files in parallel, some ahead of their use; in place of one that cannot be read, the error.

    Args:
        shape: (channels, height, width) of the images made.
        threads: 0 decodes in the calling thread; one a core if None.
        values: as in ``decode``.
        whites: as in ``decode_query``, of all files.
    """

    def load(path: Path) -> np.ndarray | ValueError:
        try:
            return decode_query(path.read_bytes(), shape[0], shape[1], values, whites)
        except ValueError as error:
            return error
        except OSError as error:
            return ValueError(error.strerror or str(error))

    threads = usable_cores() if threads is None else threads
    if not threads:
        yield from map(load, paths)
        return
    waiting: deque[Future[np.ndarray | ValueError]] = deque()
    for path in paths:
        waiting.append(_pool(threads).submit(load, path))
        if len(waiting) > AHEAD * TASK * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_pictures(root: Path, manifest: Manifest, name: str, rows: Iterable[int]) -> dict[int, np.ndarray]:
    """Single images of DOMAIN/SPLIT by row number, (channels, h, w) uint8 each; decodes no others, and reads no part of a file twice."""
    wanted, ranges, found = sorted(set(rows)), list[list[int]](), dict[int, np.ndarray]()
    for row in wanted:
        if ranges and row < ranges[-1][1] + ROWS_READ:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    decoder = Decoder(manifest, 0)
    for start, stop in ranges:
        for batch in read_rows(root, manifest, *split_name(name), start, stop, labels=False):
            kept = batch.filter(pc.is_in(batch.column("row"), pa.array(wanted)))
            numbers = kept.column("row").to_numpy()
            if len(numbers):
                found |= dict(zip(numbers.tolist(), decoder(stored_content(kept, manifest), numbers).contiguous().numpy(), strict=True))
    return found
