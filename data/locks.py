"""Locks and leases: files that tell other processes, on this machine or through a bucket, that work is in progress."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.filesystem import bucket, is_local, remove, write_text

LEASE = 600  # seconds without renewal after which a lease in a bucket expires
PATIENCE = 600  # seconds to wait for a lock in a bucket


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Mark work in progress with a file that ``is_leased`` checks. The lease ends when the process ends, even if it is killed.

    A local file is locked. In a bucket a thread renews the lease; it expires ``LEASE`` seconds after the last renewal.
    """
    if is_local(path):
        import fcntl  # noqa: PLC0415  Unix only

        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
        return
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE / 10):
            with suppress(OSError):
                write_text(path, str(time.time()))

    write_text(path, str(time.time()))
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        remove(path)


def is_leased(path: Path) -> bool:
    """Whether a live process holds the lease (``lease``) of a file."""
    if not path.exists():
        return False
    if is_local(path):
        import fcntl  # noqa: PLC0415

        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
    try:
        return time.time() - float(path.read_text()) < LEASE
    except (OSError, ValueError):
        return False


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock. A local lock ends with the process; in a bucket it is an object that can be created only once.

    Raises:
        ValueError: another process holds a bucket's lock for longer than ``PATIENCE`` seconds.
    """
    if is_local(path):
        import fcntl  # noqa: PLC0415  Unix only

        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    begun = time.monotonic()
    while True:
        try:
            with bucket(path) as (fs, name):
                fs.pipe_file(name, str(time.time()).encode(), mode="create")
            break
        except FileExistsError:
            if time.monotonic() - begun > PATIENCE:
                raise ValueError(f"another process has held {path} for more than {PATIENCE // 60} minutes: remove it if no ingest is running") from None
            time.sleep(1)
    try:
        yield
    finally:
        fs.rm_file(name)
