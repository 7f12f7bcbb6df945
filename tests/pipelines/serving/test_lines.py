"""A line to a shard's replica, in one process: calls, errors, calls that are given up, and a replica that is started anew."""

import asyncio
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving.lines import Line, Listener
from tests.pipelines.serving.service import Handle


class Mortal(Listener):
    """A listener that can end as a process that is killed."""

    writers: list[asyncio.StreamWriter]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers = [*getattr(self, "writers", []), writer]
        await super()._answer(reader, writer)

    def die(self) -> None:
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


class Served:
    """What is called."""

    def __init__(self, folder: Path, machine: str = "here") -> None:
        self.machine, self.listener = machine, Mortal(self, str(folder))
        self.by_handle = 0

    async def line(self) -> tuple[str, str]:
        self.by_handle += 1
        return self.machine, await self.listener.listen()

    async def double(self, number: int, seconds: float = 0.0) -> int:
        await asyncio.sleep(seconds)
        return 2 * number

    async def fail(self) -> None:
        raise KeyError("asked for")

    async def odd(self) -> Any:
        return lambda: None  # cannot be pickled


def test_calls_are_answered_side_by_side(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def calls() -> list[int]:
        line: Any = Line(Handle(served), "here")
        await line.double.remote(0)
        return list(await asyncio.gather(*(line.double.remote(number, 0.01 * (number % 3)) for number in range(20))))

    assert asyncio.run(calls()) == [2 * number for number in range(20)] and served.by_handle == 1
    folder = Path(served.listener.path).parent
    assert folder.parent == tmp_path and stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_an_error_is_raised_and_the_line_stays(tmp_path: Path) -> None:
    async def calls() -> int:
        line: Any = Line(Handle(Served(tmp_path)), "here")
        with pytest.raises(KeyError, match="asked for"):
            await line.fail.remote()
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):  # an answer that cannot be sent
            await line.odd.remote()
        return int(await line.double.remote(4))

    assert asyncio.run(calls()) == 8


def test_the_answer_of_a_call_that_was_given_up_is_not_the_next_ones(tmp_path: Path) -> None:
    async def calls() -> int:
        line: Any = Line(Handle(Served(tmp_path)), "here")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await line.double.remote(1, 0.2)
        return int(await line.double.remote(5, 0.3))

    assert asyncio.run(calls()) == 10


def test_a_broken_line_is_asked_for_anew(tmp_path: Path) -> None:
    """As the gateway does, which asks again after a ``ConnectionError``."""
    first, second = Served(tmp_path), Served(tmp_path)

    async def calls() -> int:
        handle = Handle(first)
        line: Any = Line(handle, "here")
        assert await line.double.remote(1) == 2
        waiting = asyncio.create_task(line.double.remote(2, 5.0))
        await asyncio.sleep(0.05)
        first.listener.die()
        with pytest.raises(ConnectionError, match="broke"):
            await waiting
        handle.served = second
        return int(await line.double.remote(3))

    assert asyncio.run(calls()) == 6 and first.by_handle == 1 and second.by_handle == 1


def test_another_machine_is_called_by_its_handle(tmp_path: Path) -> None:
    served = Served(tmp_path, "there")

    async def calls() -> int:
        line: Any = Line(Handle(served), "here")
        return int(await line.double.remote(1)) + int(await line.double.remote(2))

    assert asyncio.run(calls()) == 6 and served.by_handle == 1
