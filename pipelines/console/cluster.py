"""The connection to Ray: started once, with its log level."""

import contextlib
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from data.filesystem import is_local

NOTE = "\nFailed to apply UDF"  # Ray Data appends this to error messages
_VERBOSE = "HASHBRIDGE_VERBOSE"
PATIENCE = 10.0  # seconds in which a cluster must answer
SPINS = "1000"  # rounds that a thread spins before it sleeps; OpenMP's default is 300,000 or more


def spin_limit() -> dict[str, str]:
    """The environment variable that keeps waiting OpenMP threads from starving other processes; empty if the user has set a policy.

    It is read when torch is loaded. ``python -m tests.benchmarks.spinning`` measures what it costs and gains.
    """
    return {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ) else {"GOMP_SPINCOUNT": SPINS}


def _worker_environment() -> dict[str, Any] | None:
    """Ray's runtime environment for workers of a running cluster; those of a cluster that this process starts inherit its own."""
    spins = os.environ.get("GOMP_SPINCOUNT")
    return {"env_vars": {"GOMP_SPINCOUNT": spins}} if spins and os.environ.get("RAY_ADDRESS") else None


def set_verbose(on: bool) -> None:
    """Set whether Ray's logs are shown."""
    os.environ[_VERBOSE] = "1" if on else ""


def connect() -> Any:
    """Connect to the cluster that the environment names, or start Ray on this machine; returns the ``ray`` module.

    Ray by itself would look for the cluster that was last started here, and wait for minutes if that one was killed.

    Raises:
        ValueError: the cluster cannot be reached.
    """
    import ray  # noqa: PLC0415  takes two seconds
    import ray.data  # noqa: PLC0415

    loud = bool(os.environ.get(_VERBOSE))
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        _check_answers(address)
        if not address:
            _note_other()
        try:
            ray.init(
                address or "local", log_to_driver=loud, logging_level=logging.INFO if loud else logging.ERROR, include_dashboard=False, configure_logging=True,
                runtime_env=_worker_environment(),
            )  # fmt: skip
        except ConnectionError as error:
            raise ValueError(f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')!r}: {str(error).splitlines()[0]}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = loud
    context.print_on_execution_start = loud
    context.raise_original_map_exception = True  # Ray Data's wrapper does not preserve the wrapped exception
    if not loud:
        for name in ("ray.data", "ray.train", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are shown to the user as one line instead
    return ray


def _note_other() -> None:
    """Say which cluster runs on this machine, if one does, as it is not used."""
    with contextlib.suppress(OSError, ValueError):
        address = (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), 1).close()
        print(f"note: this starts a Ray of its own; RAY_ADDRESS={address} would use the cluster that runs here", file=sys.stderr)


def _check_answers(address: str) -> None:
    """Check that something listens at HOST:PORT or ray://HOST:PORT; Ray itself tries for minutes.

    Raises:
        ValueError: nothing does, within ``PATIENCE`` seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    end = time.monotonic() + PATIENCE
    while host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error.strerror or error}") from error
            time.sleep(0.5)


def count_nodes() -> int:
    """Number of live nodes of the connected cluster; 0 if not connected."""
    ray = sys.modules.get("ray")
    return sum(node["Alive"] for node in ray.nodes()) if ray and ray.is_initialized() else 0


def resources(name: str) -> list[float]:
    """How much of a resource, as ``CPU`` or ``GPU``, each live node of the connected cluster has."""
    return [float(node["Resources"].get(name, 0)) for node in sys.modules["ray"].nodes() if node["Alive"]]


def room(name: str, each: float) -> int:
    """How many workers or trials that take so much of a resource each the nodes have room for; none is spread over two nodes."""
    return sum(int(there / each + 1e-9) for there in resources(name))


def threads_each(workers: int, gpu: bool = False) -> int:
    """The most CPU threads that each of so many workers can have, 1 if there is no room for them; with a GPU each, a GPU's share of its node's cores."""
    if gpu:
        return max(1, int(min((cores / gpus for cores, gpus in zip(resources("CPU"), resources("GPU"), strict=True) if gpus), default=1)))
    return next((threads for threads in range(int(max(resources("CPU"))), 1, -1) if room("CPU", threads) >= workers), 1)


def storage_options(folder: Path) -> dict[str, Any]:
    """Options of Ray's ``RunConfig`` that put Ray's own files into a folder."""
    if is_local(folder):
        return {"storage_path": str(folder.resolve())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem  # noqa: PLC0415

    remote: Any = folder
    return {"storage_path": remote.path, "storage_filesystem": PyFileSystem(FSSpecHandler(remote.fs))}


def user_error(error: Exception) -> Exception:
    """The user's error wrapped in a Ray exception, or the exception itself."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (getattr(seen, "cause", None), *getattr(seen, "worker_failures", {}).values(), seen):
            if isinstance(inner, OSError) and inner.strerror:
                return OSError(inner.errno, inner.strerror.partition(NOTE)[0], inner.filename)
            for kind in (FloatingPointError, OSError, ValueError):
                if isinstance(inner, kind):
                    return kind(str(inner).partition(NOTE)[0])
            if type(inner).__module__.startswith("botocore."):
                return OSError(f"bucket: {inner}")
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return error
