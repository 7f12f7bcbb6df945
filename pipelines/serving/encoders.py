"""Encodes images for requests: keeps the last models loaded, and copies of registered ones for when the registry does not answer."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.decoding import usable_cores
from data.images import decode_query
from pipelines.registry.encoders import Encoder, RegisteredEncoder, Resolved, download, open_encoder, registry_uri
from pipelines.serving.batches import Batches

MODELS, BATCH = 4, 64  # models that stay loaded; images that are encoded at a time
COPIES = 16  # of registered models that are kept, the last that were opened


class Encoders:
    """Images to packed codes, by any of several models."""

    def __init__(self, storage: str, tracking: str, cache: str, gpu: bool = False, values: tuple[float, float] | None = None) -> None:
        """Args:
        storage, tracking: where runs are, and the registry, as in ``open_encoder``.
        cache: folder of copies of registered models.
        values: of images, as in ``decode``.
        """
        self.storage, self.tracking, self.cache, self.gpu, self.values = storage, tracking, Path(cache) / "encoders", gpu, values
        self.loaded: OrderedDict[Resolved, tuple[Encoder, Batches[np.ndarray, bytes]]] = OrderedDict()
        self.lock = asyncio.Lock()
        self.decoders = ThreadPoolExecutor(usable_cores(), "decoder")

    async def about(self, model: Resolved) -> tuple[tuple[int, ...], int] | str:
        """Shape of the rows that a model takes, and bits of its codes; a text if it cannot be loaded."""
        try:
            encoder, _ = await self._load(model)
        except (ValueError, OSError, RuntimeError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0][:300]
        return tuple(encoder.shape), encoder.bits

    async def encode(self, model: Resolved, images: list[bytes]) -> list[bytes] | tuple[int, str] | str:
        """Codes of image files; place and fault of the first that is no image; a text if the model cannot be loaded."""
        try:
            encoder, batches = await self._load(model)
        except (ValueError, OSError, RuntimeError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0][:300]
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self.decoders, decode_query, image, encoder.shape[0], encoder.shape[1], self.values) for image in images]
        decoded = await asyncio.gather(*tasks, return_exceptions=True)
        for place, row in enumerate(decoded):
            if isinstance(row, ValueError):
                return place, str(row)
            if isinstance(row, BaseException):
                raise row
        return list(await asyncio.gather(*(batches(row) for row in decoded if isinstance(row, np.ndarray))))

    async def _load(self, model: Resolved) -> tuple[Encoder, Batches[np.ndarray, bytes]]:
        if model in self.loaded:  # does not wait for another that is being loaded
            self.loaded.move_to_end(model)
            return self.loaded[model]
        async with self.lock:
            if model not in self.loaded:
                encoder = await asyncio.to_thread(self._open, model)

                async def encode(rows: list[np.ndarray]) -> list[bytes]:
                    return [code.tobytes() for code in await asyncio.to_thread(encoder, np.stack(rows))]

                self.loaded[model] = encoder, Batches(encode, BATCH)
                if len(self.loaded) > MODELS:
                    self.loaded.popitem(last=False)
            return self.loaded[model]

    def _open(self, model: Resolved) -> Encoder:
        """Open a model, a registered one from the cache, where it is copied to first.

        Raises:
            ValueError: it does not exist, or the registry cannot be reached.
        """
        if not model.source:
            return open_encoder(model.name, self.storage, self.tracking, self.gpu)
        uri = registry_uri(model.name, self.storage, self.tracking)
        copy = self.cache / hashlib.sha256(f"{uri} {model.source}".encode()).hexdigest()[:32]
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}")
            try:
                download(model.name, uri, partial)
                with contextlib.suppress(OSError):  # another replica has made it meanwhile
                    partial.rename(copy)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        os.utime(copy)
        self._prune()
        return RegisteredEncoder(str(copy), "", self.gpu)

    def _prune(self) -> None:
        """Remove the copies that were not among the last to be opened, by any service that shares the cache."""
        with contextlib.suppress(OSError):  # another service has removed one
            copies = {each: each.stat().st_mtime for each in self.cache.glob("[!.]*")}
            for old in sorted(copies, key=lambda each: copies[each])[:-COPIES]:
                gone = old.rename(old.with_name(f".{old.name}.{uuid.uuid4().hex[:8]}"))  # at once: nobody opens half of it
                shutil.rmtree(gone, ignore_errors=True)
