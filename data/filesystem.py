"""Where files lie: on this machine, or in a bucket as ``s3://bucket/prefix``. One interface, pathlib's, for both.

What is written becomes visible whole or not at all: on this machine by a rename, in a bucket as an object is put at once.
Credentials, region and endpoint are those of the environment (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` ...).
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

S3 = "s3://"
RETRIES = {"mode": "standard", "total_max_attempts": 10}  # with exponential backoff: about 50 s in all
LEASE = 600  # seconds without renewal after which a lease in a bucket has ended
PATIENCE = 600  # seconds that a lock in a bucket is waited for


def to_path(path: str | Path) -> Path:
    """A path by its name: pathlib's, or for ``s3://bucket/prefix`` one of a bucket that is used in the same way.

    Raises:
        ValueError: it is of a scheme that is not known, or names no bucket.
    """
    text = str(path)
    if "://" not in text:
        return Path(path)
    if not text.startswith(S3) or not text.removeprefix(S3).strip("/"):
        raise ValueError(f"{text.partition('?')[0]} is no place for files: give a path, or s3://bucket/prefix")
    from upath import UPath  # noqa: PLC0415  only buckets need it

    remote: Any = UPath(text, use_listings_cache=False, config_kwargs={"retries": RETRIES})
    return remote


def is_local(path: Path) -> bool:
    """Whether a path is of this machine's file system."""
    return isinstance(path, Path)


@contextmanager
def _bucket(path: Any) -> Iterator[tuple[Any, str]]:
    """The file system of a path in a bucket, and its name there; errors name the path.

    Raises:
        OSError: the bucket refuses, or does not answer.
    """
    try:
        yield path.fs, path.path
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file on this machine to write to, which becomes ``path`` when the context is left without an error; folders are made."""
    if is_local(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            yield partial
            _settle(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="hashbridge-") as folder:
        partial = Path(folder) / path.name
        yield partial
        with _bucket(path) as (fs, name):
            fs.put_file(str(partial), name)


def append_text(path: Path, text: str) -> None:
    """Add text to a file that one process writes; in a bucket the whole of it is put again."""
    if is_local(path):
        with path.open("a") as file:
            file.write(text)
        return
    write_text(path, (path.read_text() if path.exists() else "") + text)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with atomic_write(path) as partial:
        partial.write_text(text)


@contextmanager
def atomic_folder(path: Path, last: str) -> Iterator[Path]:
    """A folder on this machine to fill with files, which takes the place of ``path`` when the context is left without an error.

    Args:
        last: the file that a bucket gets last, by which a reader tells that the others are there.
    """
    if is_local(path):
        partial = path.with_name(f".partial-{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for each in partial.iterdir():
                _settle(each)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="hashbridge-") as folder:
        yield Path(folder)
        remove(path)
        with _bucket(path) as (fs, name):
            for each in sorted(Path(folder).iterdir(), key=lambda each: each.name == last):
                fs.put_file(str(each), f"{name}/{each.name}")


def _settle(path: Path) -> None:
    """Bring a file's content to the disk before it takes its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file or folder as one of this machine, to read."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hashbridge-") as folder:
        copy = Path(folder) / path.name
        with _bucket(path) as (fs, name):
            for each in fs.find(name):
                part = Path(f"{copy}{each.removeprefix(name)}")
                part.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(each, str(part))
        yield copy


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or what there is of it."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with _bucket(path) as (fs, name):
        found = fs.find(name)
        if found:
            fs.rm(found)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to other folders are not followed."""
    if is_local(folder):
        return sorted(Path(top) / name for top, _, names in os.walk(folder) for name in names)
    with _bucket(folder) as (fs, name):
        return [folder / each.removeprefix(f"{name}/") for each in fs.find(name)]


def move(source: Path, target: Path) -> None:
    """Give a folder another name. A bucket copies each object, and then removes the first."""
    if is_local(source):
        source.rename(target)
        return
    with _bucket(source) as (fs, old), _bucket(target) as (_, new):
        for each in fs.find(old):
            fs.cp_file(each, new + each.removeprefix(old))
    remove(source)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, of which no more is read than is asked for."""
    if is_local(path):
        return pq.ParquetFile(path)
    with _bucket(path) as (fs, name):
        return pq.ParquetFile(name, filesystem=fs)


def read_table(path: Path) -> pa.Table:
    """The rows of a Parquet file."""
    with open_parquet(path) as file:
        return file.read()


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Mark work as going on, by a file that :func:`is_leased` looks at. The lease ends with the process, however that ends.

    On a local file system the file is locked; in a bucket a thread renews it, and it ends ``LEASE`` seconds after the last renewal.
    """
    if is_local(path):
        import fcntl  # noqa: PLC0415  not there on every system

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
    """Whether a live process holds the lease of a file (:func:`lease`)."""
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
    """Hold a lock, which is a file. On this machine it ends with the process, however that ends; in a bucket it is an object that is put once.

    Raises:
        ValueError: a bucket's lock is held by someone who does not let go.
    """
    if is_local(path):
        import fcntl  # noqa: PLC0415  not there on every system

        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    begun = time.monotonic()
    while True:
        try:
            with _bucket(path) as (fs, name):
                fs.pipe_file(name, str(time.time()).encode(), mode="create")
            break
        except FileExistsError:
            if time.monotonic() - begun > PATIENCE:
                raise ValueError(f"{path} is held by another for more than {PATIENCE // 60} minutes: remove it if nobody is at work") from None
            time.sleep(1)
    try:
        yield
    finally:
        fs.rm_file(name)
