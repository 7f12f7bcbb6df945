"""Takes requests apart: encodes images, asks all shards of one version of an index, and merges their answers."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.retrieval.queries import class_name
from pipelines.retrieval.sharded_index import Record, nearest
from pipelines.serving.batches import Batches
from pipelines.serving.served import Choice, Served
from pipelines.serving.shards import Filter, Found, Place, Query

logger = logging.getLogger("ray.serve")
BATCH = 256  # queries that are sent to the shards at once
OPENING = 300.0  # seconds in which a version must be open
PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between tries to reach what has died and is started again
Answer = TypeVar("Answer")


class RequestError(Exception):
    """A request that cannot be answered: the HTTP status, and one line that says why."""

    def __init__(self, status: int, reason: str, retry_after: int = 0) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after


@dataclass
class Side:
    """An index that is served under a name, with the handles of its shards' deployments.

    Attributes:
        now: the version that new requests get; None until the first has been opened.
        fault: why the latest version could not be opened.
    """

    name: str
    choice: Choice
    shards: Sequence[Any]
    now: "Version | None" = None
    fault: str = ""


class Version:
    """A version of an index that is open: requests that begin with it end with it.

    Attributes:
        shape: of the rows that its model takes.
        labels: the labels of its rows by class name.
        domains: of its rows.
    """

    def __init__(self, gateway: "Gateway", side: Side, served: Served) -> None:
        self.gateway, self.side, self.served, count = gateway, side, served, len(side.shards)
        pairs = [(shard, served.places[number::count]) for number, shard in enumerate(side.shards)]
        self.shards: list[tuple[Any, list[Place]]] = [pair for pair in pairs if pair[1]]
        self.queries = Batches(self._search, BATCH)
        self.shape, self.labels, self.domains = tuple[int, ...](), dict[str, int](), list[str]()

    async def open(self) -> str:
        """Have the model and the shards loaded; returns why they cannot be, or ""."""
        encodes = await self.gateway.ask(lambda: self.gateway.encoder.about.remote(self.served.model))
        if isinstance(encodes, str):
            return encodes
        self.shape, bits = tuple(encodes[0]), encodes[1]
        manifest = self.served.manifest
        if bits != manifest["bits"]:
            return f"the model gives {bits} bits, the index holds {manifest['bits']}"
        try:
            parts = await self._all("about")
        except RequestError as error:
            return error.reason
        labels = sorted({label for part in parts for label in part["labels"] if label >= 0})
        self.labels = {class_name(label, manifest["classes"]): label for label in labels}
        self.domains = sorted({domain for part in parts for domain in part["domains"]} - {""})
        return ""

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What every shard's deployment answers."""

        def call(shard: Any, places: list[Place]) -> Awaitable[Any]:
            return self.gateway.ask(lambda: getattr(shard, method).remote(places, *arguments))

        found = list(await asyncio.gather(*(call(shard, places) for shard, places in self.shards)))
        for part in found:
            if isinstance(part, str):
                raise RequestError(503, f"a shard cannot be read: {part}", 5)
        return found

    async def _search(self, queries: list[Query]) -> list[Found]:
        shards = [answers for part in await self.gateway.within(self._all("search", queries)) for answers in part]
        return [nearest((answers[number] for answers in shards), query.k) for number, query in enumerate(queries)]

    def wanted(self, label: str, domain: str) -> Filter:
        """The filter of a class name and a domain, "" for any."""
        if label and label not in self.labels:
            raise RequestError(422, f"the index has no class {label[:100]!r}")
        if domain and domain not in self.domains:
            raise RequestError(422, f"the index has no domain {domain[:100]!r}")
        return Filter(self.labels[label] if label else None, domain)

    async def encode(self, images: list[bytes]) -> list[bytes]:
        """Codes of images; refused with 422 if one is none."""
        codes = await self.gateway.ask(lambda: self.gateway.encoder.encode.remote(self.served.model, images))
        if isinstance(codes, str):
            raise RequestError(503, codes, 5)
        if isinstance(codes, tuple):
            raise RequestError(422, f"image {codes[0] + 1} of {len(images)} cannot be read: {codes[1]}")
        return list(codes)

    async def search(self, queries: list[Query]) -> list[Found]:
        """The nearest rows to each query."""
        return list(await asyncio.gather(*map(self.queries, queries)))

    async def find(self, name: str) -> Record:
        """The row of an id, with its code; refused with 404 if the index has none."""
        rows = [row for row in await self._all("find", name) if row]
        if not rows:
            raise RequestError(404, f"the index has no id {name[:200]!r}")
        found: Record = rows[0]
        return found

    async def some(self, wanted: Filter, count: int, seed: int) -> list[Record]:
        """At most ``count`` rows that match a filter, drawn at random from all shards alike."""
        parts = await self._all("some", wanted, count, seed)
        return [row for turn in itertools.zip_longest(*parts) for row in turn if row][:count]


class Gateway:
    """Answers requests with the deployments behind it."""

    def __init__(self, sides: list[Side], encoder: Any, unreachable: tuple[type[BaseException], ...], poll: float = 2.0, timeout: float = 30.0) -> None:
        """Args:
        encoder: handle of the deployment of ``encoders.Encoders``. Methods of handles have ``remote``, whose result is awaited.
        unreachable: errors of a deployment that has died and is started again.
        poll: seconds between looks at the index and the alias.
        timeout: seconds for a request.
        """
        self.sides, self.encoder, self.unreachable = {side.name: side for side in sides}, encoder, unreachable
        self.poll, self.timeout, self.retried = poll, timeout, 0

    async def watch(self) -> None:
        """Open the latest versions, now and whenever there are others."""
        while True:
            for side in self.sides.values():
                try:
                    await self.renew(side)
                except TimeoutError:
                    side.fault = f"the latest version was not open after {OPENING:.0f} s"
                except Exception as error:
                    side.fault = f"{type(error).__name__}: {error}"
                    logger.exception("the latest version of %s could not be opened", side.name)
            await asyncio.sleep(self.poll)

    async def renew(self, side: Side) -> None:
        """Serve the latest version of an index, once all that it needs has been opened."""
        before, now = (side.choice.refused, side.fault), side.now
        try:
            latest = await asyncio.to_thread(side.choice.latest, now.served if now else None)
        except ValueError as error:
            side.fault = str(error)
        else:
            if now is None or latest is not now.served:
                version = Version(self, side, latest)
                async with asyncio.timeout(OPENING):
                    side.fault = await version.open()
                if not side.fault:
                    side.now = version
                    logger.warning("%s: %s is served", side.name, latest.label)
            else:
                side.fault = ""
        if (side.choice.refused, side.fault) != before and (reason := side.choice.refused or side.fault):
            logger.warning("%s: the latest version is refused: %s", side.name, reason)

    async def ask(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """What a deployment answers; asked again while it is started anew."""
        pause = PAUSE
        while True:
            try:
                return await call()
            except self.unreachable as error:
                self.retried += 1
                logger.warning("asked again after %s", type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def version(self, name: str) -> Version:
        """The version of an index (by name, "" for the first) that a request begins with."""
        side = self.sides.get(name) if name else next(iter(self.sides.values()))
        if side is None:
            raise RequestError(404, f"no index {name[:100]!r}: there are {', '.join(self.sides)}")
        if side.now is None:
            raise RequestError(503, "the index is not open yet", 1)
        return side.now

    def health(self) -> tuple[bool, Record]:
        """Whether requests are answered, and the state of each index."""
        sides = dict[str, Record]()
        for side in self.sides.values():
            served = side.now.served if side.now else None
            opened = {"version": served.manifest["version"], "model": served.model.name, "codes": served.count} if served else {}
            sides[side.name] = opened | {"refused": side.choice.refused or side.fault, "registry": side.choice.unreachable}
        ready = all(side.now for side in self.sides.values())
        troubled = any(state["refused"] or state["registry"] for state in sides.values())
        return ready, {"status": ("degraded" if troubled else "ok") if ready else "starting", "indexes": sides}

    async def within(self, work: Awaitable[Answer]) -> Answer:
        """The result of a request's work; refused with 504 after the time limit."""
        try:
            async with asyncio.timeout(self.timeout):
                return await work
        except TimeoutError:
            raise RequestError(504, f"no answer within {self.timeout:g} s") from None


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Write the milliseconds that a block takes."""
    begun = time.perf_counter()
    yield
    times[name] = round((time.perf_counter() - begun) * 1e3, 3)
