"""One interface, pathlib's, to files on this machine and in buckets (``s3://bucket/prefix``).

Writes are atomic: readers see a file either complete or not at all. On this machine a rename does this; a bucket stores
each object atomically. Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``,
``AWS_ENDPOINT_URL`` ...).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

S3 = "s3://"
RETRIES = {"mode": "standard", "total_max_attempts": 10}  # with exponential backoff, about 50 s in total


def to_path(path: str | Path) -> Path:
    """A path object for a path or an ``s3://bucket/prefix`` URI; both kinds have pathlib's interface.

    Raises:
        ValueError: the scheme is unknown, or no bucket is named.
    """
    text = str(path)
    if "://" not in text:
        return Path(path)
    if not text.startswith(S3) or not text.removeprefix(S3).strip("/"):
        raise ValueError(f"{text.partition('?')[0]} is not a supported path: give a local path or s3://bucket/prefix")
    from upath import UPath  # noqa: PLC0415  only buckets need it

    remote: Any = UPath(text, use_listings_cache=False, config_kwargs={"retries": RETRIES})
    return remote


def is_local(path: Path) -> bool:
    """Whether a path is on this machine's file system."""
    return isinstance(path, Path)


@contextmanager
def bucket(path: Any) -> Iterator[tuple[Any, str]]:
    """File system and key of a path in a bucket. Errors raised inside name the path.

    Raises:
        OSError: the bucket refuses the request or does not answer.
    """
    try:
        yield path.fs, path.path
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a local file that replaces ``path`` if the block ends without an error. Creates folders."""
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
        with bucket(path) as (fs, name):
            fs.put_file(str(partial), name)


def append_text(path: Path, text: str) -> None:
    """Append text to a file that only one process writes. In a bucket the whole file is written again."""
    if is_local(path):
        with path.open("a") as file:
            file.write(text)
        return
    write_text(path, (path.read_text() if path.exists() else "") + text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text)


@contextmanager
def atomic_folder(path: Path, last: str) -> Iterator[Path]:
    """Write a folder atomically: yields a local folder that replaces ``path`` if the block ends without an error.

    Args:
        last: name of the file that is uploaded last to a bucket; its presence tells readers that the folder is complete.
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
        with bucket(path) as (fs, name):
            for each in sorted(Path(folder).iterdir(), key=lambda each: each.name == last):
                fs.put_file(str(each), f"{name}/{each.name}")


def _settle(path: Path) -> None:
    """Flush a file to disk before it is renamed."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a local copy of a file or folder for reading; a local path is yielded as it is."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hashbridge-") as folder:
        copy = Path(folder) / path.name
        with bucket(path) as (fs, name):
            for each in fs.find(name):
                part = Path(f"{copy}{each.removeprefix(name)}")
                part.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(each, str(part))
        yield copy


def remove(path: Path) -> None:
    """Remove a folder with its content, or a file of a bucket; nothing happens if it does not exist."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with bucket(path) as (fs, name):
        found = fs.find(name)
        if found:
            fs.rm(found)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted. Linked folders are followed, each folder once."""
    if is_local(folder):
        found, seen = [], set()
        for top, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(top)
            if real in seen:  # a link to a folder that was there already, or to one above itself
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            found += [Path(top) / name for name in names]
        return sorted(found)
    with bucket(folder) as (fs, name):
        return [folder / each.removeprefix(f"{name}/") for each in fs.find(name)]


def move(source: Path, target: Path) -> None:
    """Rename a folder. In a bucket each object is copied and then deleted."""
    if is_local(source):
        source.rename(target)
        return
    with bucket(source) as (fs, old), bucket(target) as (_, new):
        for each in fs.find(old):
            fs.cp_file(each, new + each.removeprefix(old))
    remove(source)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; only the requested parts are read."""
    if is_local(path):
        return pq.ParquetFile(path)
    with bucket(path) as (fs, name):
        return pq.ParquetFile(name, filesystem=fs)


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file."""
    with open_parquet(path) as file:
        return file.read()
