"""A direct line from the gateway to the only replica of a shard, where both are on one machine: a Unix socket, without Ray Serve's router.

A call by Ray Serve takes one to three milliseconds, one by a line a fifth of a millisecond. Ray Serve starts the replica, watches it and
starts it again; a line that breaks is asked for anew, by Ray Serve.
"""

import asyncio
import os
import pickle
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

LENGTH = 8  # bytes of a message's length, before the message


class Listener:
    """Answers calls of an object's methods on a Unix socket that this user alone can open."""

    def __init__(self, served: Any, folder: str | None = None) -> None:
        """Args:
        served: what has the methods, which are coroutines.
        folder: in which the socket gets a folder of its own (default: the temporary folder).
        """
        self.served, self.folder = served, folder
        self.path = ""
        self.server: asyncio.Server | None = None

    async def listen(self) -> str:
        """Path of the socket, which is open from the first call on."""
        if not self.path:
            self.path = os.path.join(tempfile.mkdtemp(prefix="hb-", dir=self.folder), "line")
            self.server = await asyncio.start_unix_server(self._answer, self.path)
        return self.path

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                method, arguments = await _receive(reader)
                try:
                    answer = _packed((True, await getattr(self.served, method)(*arguments)))
                except Exception as error:  # also an answer that cannot be packed, which would be asked for again and again
                    answer = _packed((False, error))
                writer.write(answer)
                await writer.drain()
        except (OSError, EOFError):  # the caller has gone
            pass
        finally:
            writer.close()


class Line:
    """Stands for a handle of a deployment with one replica: ``line.method.remote(...)`` is awaited.

    Each call has a connection of its own, which the next one takes over.
    """

    def __init__(self, handle: Any, machine: str) -> None:
        """Args:
        handle: whose deployment has a method ``line``, which gives its machine and the path of its socket.
        machine: this one.
        """
        self._handle, self._machine = handle, machine
        self._path: str | None = None
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._call, method))

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._path is None:
            machine, path = await self._handle.line.remote()
            self._path = path if machine == self._machine else ""
        if not self._path:
            return await getattr(self._handle, method).remote(*arguments)
        writer = None
        try:
            reader, writer = self._free.pop() if self._free else await asyncio.open_unix_connection(self._path)
            writer.write(_packed((method, arguments)))
            answered, result = await _receive(reader)
        except BaseException as error:  # also a call that is given up: its answer must not be taken for the next one's
            if writer:
                writer.close()
            if not isinstance(error, OSError | EOFError):
                raise
            self._forget()
            raise ConnectionError(f"the line to {self._path or 'a shard'} broke") from error
        self._free.append((reader, writer))
        if not answered:
            raise result
        return result

    def _forget(self) -> None:
        self._path = None
        for _, writer in self._free:
            writer.close()
        self._free.clear()


def _packed(message: Any) -> bytes:
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(LENGTH, "big") + content


async def _receive(reader: asyncio.StreamReader) -> Any:
    content = await reader.readexactly(int.from_bytes(await reader.readexactly(LENGTH), "big"))
    return pickle.loads(content)  # noqa: S301  of this user's processes alone: the socket's folder is closed to others
