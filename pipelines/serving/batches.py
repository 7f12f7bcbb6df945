"""Groups what many requests ask for into batches, without making a single request wait.

Ray Serve's own ``batch`` decides on a batch before the one that is under way has ended: with 32 clients it made batches of few.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches(Generic[Item, Answer]):
    """Runs a function on all items that came while it ran before, at most ``size`` at a time."""

    def __init__(self, function: Callable[[list[Item]], Awaitable[Sequence[Answer]]], size: int) -> None:
        """Args:
        function: an answer for each item, in their order; an exception is all items'.
        """
        self.function, self.size = function, size
        self.waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self.task: asyncio.Task[None] | None = None

    def __call__(self, item: Item) -> "asyncio.Future[Answer]":
        """The answer to an item, when it is there."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((item, future))
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        return future

    async def _run(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            batch = [(item, future) for item, future in batch if not future.done()]  # their clients have gone
            if not batch:
                continue
            try:
                answers = await self.function([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        self.task = None
