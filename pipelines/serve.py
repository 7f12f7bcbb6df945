"""Command: search as a service on Ray Serve, with a page."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.console import cluster
from pipelines.console.config import RANGE, option, positional, value_range
from pipelines.registry.encoders import found_by_workers, registry_uri
from pipelines.serving.environment import fast_environment, hashed_token, is_loopback
from pipelines.serving.served import Choice

CPUS = 0.5  # that a replica reserves, or its part of a machine that has fewer
OPENING = 300.0  # seconds in which the first version must be open


@dataclass
class Config:
    """Options of ``hashbridge serve``."""

    index: str = positional("folder that `hashbridge index` wrote")
    model: str = option("", "models:/NAME@ALIAS, which is followed when it moves, or a run's id (default: the one that encoded the index)")
    compare: str = option("", "folder of a second index, which the page shows beside the first")
    compare_model: str = option("", "the second index's model")
    host: str = option("127.0.0.1", "address to listen at; off this machine a token is needed, in HASHBRIDGE_TOKEN")
    port: int = option(8000, "port to listen at")
    replicas: int = option(1, "replicas of the gateway, the encoder and each shard")
    most_replicas: int = option(0, "grow with the load up to this number of replicas of each (default: stay at --replicas)")
    gpu: bool = option(False, "give each encoder a GPU")
    range: str = option("", RANGE)
    timeout: float = option(30.0, "seconds for a request")
    waiting: int = option(128, "requests that a gateway works on at once; more are answered with 503")
    body_limit: int = option(32, "MiB of a request's body")
    poll: float = option(2.0, "seconds between looks at the index and the alias")
    cache: str = option(str(Path.home() / ".cache" / "hashbridge"), "where copies of registered models are kept")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")

    def __post_init__(self) -> None:
        value_range(self.range)
        for name in ("port", "replicas", "waiting", "body_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 1")
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}, but must be at most 65535")
        if ":" in self.host:
            raise ValueError(f"--host is {self.host!r}, but must be an IPv4 address or a name: Ray Serve's proxy does not listen at others")
        if self.timeout <= 0 or self.poll <= 0:
            raise ValueError("--timeout and --poll must be above 0")
        if self.compare_model and not self.compare:
            raise ValueError("--compare-model is the model of a second index: give its folder by --compare")


def run(config: Config) -> dict[str, Any]:
    """Serve until interrupted; returns the address."""
    with running(config) as url:
        print(f"serving at {url} (the page), {url}/docs (how to ask), {url}/healthz, {url}/metrics; Ctrl-C ends it", flush=True)
        stopped = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, lambda *_: stopped.set())
        stopped.wait()
        print("ending ...", flush=True)
    return {"url": url}


@contextlib.contextmanager
def running(config: Config) -> Iterator[str]:
    """Serve an index inside a context; gives the service's address.

    Raises:
        ValueError: what is to be served is not there or does not fit, the port is taken, or a token is missing.
    """
    token = hashed_token(needed=not is_loopback(config.host))
    asked = [(folder, model) for folder, model in ((config.index, config.model), (config.compare, config.compare_model)) if folder]
    chosen = [Choice(folder, model, config.storage, config.tracking).latest(None) for folder, model in asked]
    tracking = next((uri for each in chosen if (uri := registry_uri(each.model.name, config.storage, config.tracking))), "")
    _check_port(config.host, config.port)
    own = not os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as at_end:
        if own:
            _end_ray()  # one that this process has started was not started for a service
            folder = tempfile.mkdtemp(prefix="hb-", dir="/tmp")  # the path of a socket may have 97 characters
            at_end.callback(shutil.rmtree, folder, ignore_errors=True)
            at_end.callback(_end_ray)
            for name, value in fast_environment(folder).items():
                os.environ.setdefault(name, value)
        ray = cluster.connect()
        from ray import serve  # noqa: PLC0415

        from pipelines.serving import application  # noqa: PLC0415

        if not os.environ.get("HASHBRIDGE_VERBOSE"):
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        replicas = (sum(len(each.places) for each in chosen) + 2) * config.replicas
        settings = application.Settings(
            index=application.absolute(config.index), model=found_by_workers(config.model, config.storage),
            compare=config.compare and application.absolute(config.compare), compare_model=found_by_workers(config.compare_model, config.storage),
            storage=application.absolute(config.storage), tracking=tracking, cache=application.absolute(config.cache),
            replicas=config.replicas, most=config.most_replicas, cpus=min(CPUS, ray.cluster_resources().get("CPU", 1.0) / replicas), gpu=config.gpu,
            values=value_range(config.range), timeout=config.timeout, poll=config.poll, waiting=config.waiting, body=config.body_limit, token=token,
        )  # fmt: skip
        options = {"host": config.host, "port": config.port, "request_timeout_s": config.timeout + 30}
        if not own:
            at_end.callback(serve.delete, application.NAME)
        with _start_told(ray.exceptions.RayError):
            serve.start(http_options=options, logging_config=application.QUIET)
        serve.run_many([serve.RunTarget(application.application(settings), application.NAME)], wait_for_applications_running=False)
        url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
        _wait(url, lambda: serve.status().applications[application.NAME])
        yield url


def _end_ray() -> None:
    """End the Ray that this process has started, if it has."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"nothing can listen at {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def _start_told(error_class: type[Exception]) -> Iterator[None]:
    """Say in one line why Ray Serve does not start, for instance because a program took one of its ports in the meantime."""
    try:
        yield
    except error_class as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
        raise ValueError(f"Ray Serve does not start; if a port was taken, try once more: {reason}") from error


def _wait(url: str, state: Callable[[], Any]) -> None:
    """Wait until the first version is open.

    Args:
        state: what Ray Serve says of the application.

    Raises:
        ValueError: it cannot be opened; says why.
    """
    end, open_url = time.monotonic() + OPENING, urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # without the environment's proxy
    while time.monotonic() < end:
        told = state()
        if told.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ValueError(f"the service cannot start: {' '.join(told.message.split())[-500:]}")
        try:
            with open_url(f"{url}/healthz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            with error:
                content = error.read()
            found = json.loads(content) if content[:1] == b"{" else {}
            faults = [each["refused"] for each in found.get("indexes", {}).values() if each.get("refused")]
            if faults:
                raise ValueError(faults[0]) from None
        except OSError:  # nothing listens yet
            pass
        time.sleep(0.2)
    waiting = [f"{name} ({each.status}: {each.message})" for name, each in state().deployments.items() if each.status != "HEALTHY"]
    raise ValueError(f"the service was not ready after {OPENING:.0f} s; waiting for {'; '.join(waiting)[:500] or 'encoder and shards to answer'}")
