"""Ray, started once where it is wanted, and how loud it is."""

import logging
import os
from typing import Any

_VERBOSE = "HASHBRIDGE_VERBOSE"


def verbose(on: bool) -> None:
    """Whether Ray's logs are shown."""
    os.environ[_VERBOSE] = "1" if on else ""


def start() -> Any:
    """Connect to the cluster of the environment, or start one on this machine; returns the ``ray`` module.

    Raises:
        ValueError: the cluster that the environment names cannot be reached.
    """
    import ray  # noqa: PLC0415  two seconds that `--help` need not spend
    import ray.data  # noqa: PLC0415

    loud = bool(os.environ.get(_VERBOSE))
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=loud, logging_level=logging.INFO if loud else logging.ERROR, include_dashboard=False, configure_logging=True)
        except ConnectionError as error:
            raise ValueError(f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')!r}: {str(error).splitlines()[0]}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = loud
    context.print_on_execution_start = loud
    if not loud:
        for name in ("ray.data", "ray.train", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach the user as ours, in one line
    return ray


def user_error(error: Exception) -> Exception:
    """The user's error inside an exception that Ray wrapped around it, or the exception itself."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (seen, getattr(seen, "cause", None), *getattr(seen, "worker_failures", {}).values()):
            if isinstance(inner, OSError) and inner.strerror:
                return OSError(inner.errno, inner.strerror, inner.filename)
            if isinstance(inner, ValueError | FloatingPointError | OSError):
                return type(inner)(*inner.args)
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return error
