"""Sends a run's record to a tracking server in a background thread: in order, with retries, without delaying training."""

import queue
import sys
import threading
import time
from collections.abc import Callable

FIRST, LONGEST = 1.0, 15.0  # seconds between tries: first and longest


def send_with_retries(send: Callable[[], None], patience: float, given_up: threading.Event | None = None) -> bool:
    """Send something, with retries while the server is unreachable; returns whether it was sent in time.

    Args:
        send: raises ValueError if the server is unreachable; must be idempotent.
        patience: seconds after which no further try starts.
        given_up: set to stop earlier.
    """
    begun, pause, said = time.monotonic(), FIRST, False
    while True:
        try:
            send()
        except ValueError as error:
            if not said:
                print(f"note: {error}; retrying", file=sys.stderr, flush=True)
            said = True
            if time.monotonic() - begun + pause > patience or (given_up or threading.Event()).wait(pause):
                return False
            pause = min(2 * pause, LONGEST)
        else:
            if said:
                print("note: the tracking server answers again", file=sys.stderr, flush=True)
            return True


class TrackingQueue:
    """A background thread that sends items in order."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.given_up = threading.Event()
        self.sent = True
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def __call__(self, send: Callable[[], None]) -> None:
        """Queue an item."""
        self.waiting.put(send)

    def _work(self) -> None:
        while (send := self.waiting.get()) is not None:
            self.sent = self.sent and send_with_retries(send, float("inf"), self.given_up)

    def close(self, patience: float) -> bool:
        """Wait up to ``patience`` seconds for the rest; returns whether everything was sent."""
        self.waiting.put(None)
        self.thread.join(patience)
        self.given_up.set()
        return self.sent and not self.thread.is_alive()
