"""A service in one process, without Ray: the gateway, with shards and encoders as it has them, called directly."""

import asyncio
import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import uvicorn
from PIL import Image

from pipelines.registry.encoders import Resolved
from pipelines.retrieval import index_changes
from pipelines.retrieval.code_files import SCHEMA
from pipelines.serving.api import create_app
from pipelines.serving.gateway import Gateway, Side
from pipelines.serving.guard import Limits
from pipelines.serving.served import Choice
from pipelines.serving.shards import Shards
from tests.servers import free_port

SIZE, BITS, CLASSES = 8, 32, ["cat", "dog", "owl"]


class Handle:
    """What a deployment's handle is to the gateway: ``handle.method.remote(...)`` is awaited.

    Attributes:
        faults: errors that the next calls raise instead of being answered.
    """

    def __init__(self, served: Any) -> None:
        self.served, self.faults = served, list[BaseException]()

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            await asyncio.sleep(0)
            if self.faults:
                raise self.faults.pop()
            return await getattr(self.served, method)(*arguments)

        return SimpleNamespace(remote=remote)


class FoldingEncoders:
    """Encoders without a network: an image's code is the threshold of its first pixels."""

    def __init__(self) -> None:
        self.bits, self.shape = BITS, (1, SIZE, SIZE)

    async def about(self, model: Resolved) -> tuple[tuple[int, ...], int]:
        return self.shape, self.bits

    async def encode(self, model: Resolved, images: list[bytes]) -> Any:
        from data.images import decode

        codes = []
        for place, image in enumerate(images):
            try:
                codes.append(np.packbits(decode(image, 1, SIZE).reshape(-1)[:BITS] > 127, bitorder="little").tobytes())
            except ValueError as error:
                return place, str(error)
        return codes


def png(row: np.ndarray) -> bytes:
    """A grey image (1, h, w) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(row[0]).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, count: int) -> list[Path]:
    """Small images of noise, PNG files."""
    draw = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03}.png" for number in range(count)]
    for file in files:
        file.write_bytes(png(draw.integers(0, 256, (1, SIZE, SIZE), np.uint8)))
    return files


def rows(count: int, seed: int = 0, files: Sequence[Path] = ()) -> pa.Table:
    """Rows of codes with many ties, of three classes, some without one, of two domains; the first have images."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 4, (count, BITS // 8), np.uint8)
    ids = [f"a/{(number * 7919) % 10007} ü.png" for number in range(count)]
    origins = [str(files[n]) if n < len(files) else f"/sets/x#{'photo' if n % 2 else 'sketch'}/train#{n}" for n in range(count)]
    return pa.table([ids, [n % 4 - 1 for n in range(count)], [code.tobytes() for code in codes], origins], schema=SCHEMA)


def make_index(folder: Path, table: pa.Table, shards: int = 1, kind: str = "flat", model: str = "run") -> dict[str, Any]:
    """An index of a table, built in this process."""
    with built_here():
        return index_changes.create(folder, table, {"bits": str(BITS), "model": model, "classes": json.dumps(CLASSES)}, kind, shards, lists=5)


@contextlib.contextmanager
def built_here() -> Iterator[None]:
    """Build the shards of an index in this process, without Ray."""
    built, index_changes._built = index_changes._built, lambda folder, parts, *more: [index_changes.build_shard(folder, part, *more) for part in parts]
    try:
        yield
    finally:
        index_changes._built = built


class Settled(Choice):
    """A choice between versions of an index whose models need no registry: a run of any name is there."""

    def _resolved(self, model: str, now: Any) -> Resolved:
        return Resolved(model, Path(model).name, "", "")


def service(
    *folders: Path, deployments: int = 2, token: str = "", limits: Limits | None = None, poll: float = 0.05, timeout: float = 20.0
) -> tuple[Any, Gateway]:  # fmt: skip
    """The application and the gateway of indexes."""
    sides = [Side(folder.name, Settled(str(folder), "", "", ""), [Handle(Shards()) for _ in range(deployments)]) for folder in folders]
    gateway = Gateway(sides, Handle(FoldingEncoders()), (ConnectionError,), poll, timeout)
    hashed = hashlib.sha256(token.encode()).hexdigest() if token else ""
    return create_app(gateway, limits or Limits(), hashed), gateway


@contextlib.contextmanager
def running(app: Any) -> Iterator[httpx2.Client]:
    """Serve an application on a port of this machine; gives a client of it once the indexes are open."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: server.started)
            until(lambda: client.get("/healthz").status_code == 200)
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


def until(true: Any, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.02)
