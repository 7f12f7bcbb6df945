"""What a run has to tell a tracking server that may be away for a while: sent in order, tried again, never in training's way."""

import queue
import sys
import threading
import time
from collections.abc import Callable

FIRST, LONGEST = 1.0, 15.0  # seconds between two tries


def send_with_retries(send: Callable[[], None], patience: float, given_up: threading.Event | None = None) -> bool:
    """Send something, again and again while the server does not take it; whether it did in time.

    Args:
        send: raises ValueError where the server is away; sending twice does what sending once does.
        patience: seconds after which no other try begins.
        given_up: ends the tries before that.
    """
    begun, pause, said = time.monotonic(), FIRST, False
    while True:
        try:
            send()
        except ValueError as error:
            if not said:
                print(f"note: {error}; it is tried again", file=sys.stderr, flush=True)
            said = True
            if time.monotonic() - begun + pause > patience or (given_up or threading.Event()).wait(pause):
                return False
            pause = min(2 * pause, LONGEST)
        else:
            if said:
                print("note: the tracking server answers again", file=sys.stderr, flush=True)
            return True


class TrackingQueue:
    """A thread that sends one thing after the other, as long as each takes."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.given_up = threading.Event()
        self.sent = True
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def __call__(self, send: Callable[[], None]) -> None:
        """Send this after what was given before."""
        self.waiting.put(send)

    def _work(self) -> None:
        while (send := self.waiting.get()) is not None:
            self.sent = self.sent and send_with_retries(send, float("inf"), self.given_up)

    def close(self, patience: float) -> bool:
        """Wait for the rest to be sent, so many seconds; whether all was."""
        self.waiting.put(None)
        self.thread.join(patience)
        self.given_up.set()
        return self.sent and not self.thread.is_alive()
