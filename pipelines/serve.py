"""Command: search as a service on Ray Serve, with a page."""

import ipaddress
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.filesystem import to_path
from models.allocator import keep_freed_memory
from pipelines.console import cluster
from pipelines.console.config import option, positional
from pipelines.registry.encoders import registry_uri
from pipelines.retrieval.sharded_index import read_manifest

FAST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # HAProxy before the gateway, gRPC behind it: a fifth of the latency
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
    timeout: float = option(30.0, "seconds for a request")
    waiting: int = option(128, "requests that a gateway works on at once; more are answered with 503")
    body_limit: int = option(32, "MiB of a request's body")
    poll: float = option(2.0, "seconds between looks at the index and the alias")
    cache: str = option(str(Path.home() / ".cache" / "hashbridge"), "where copies of registered models are kept")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI of the registry (default: as in train)")

    def __post_init__(self) -> None:
        for name in ("port", "replicas", "waiting", "body_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 1")
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}, but must be at most 65535")
        if self.timeout <= 0 or self.poll <= 0:
            raise ValueError("--timeout and --poll must be above 0")
        if self.compare_model and not self.compare:
            raise ValueError("--compare-model is the model of a second index: give its folder by --compare")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


class running:  # noqa: N801  used as a function
    """A context in which an index is served; gives the service's address."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError if what is to be served is not there, the port is taken, or a token is missing."""
        self.config = config
        manifests = [read_manifest(to_path(folder)) for folder in (config.index, config.compare) if folder]
        models = [given or manifest["model"] for given, manifest in zip((config.model, config.compare_model), manifests, strict=False)]
        self.tracking = next((uri for model in models if (uri := registry_uri(model, config.storage, config.tracking))), "")
        _check_port(config.host, config.port)
        keep_freed_memory()
        if not os.environ.get("RAY_ADDRESS"):
            for name, value in FAST.items():
                os.environ.setdefault(name, value)

    def __enter__(self) -> str:
        ray = cluster.connect()
        from ray import serve  # noqa: PLC0415

        from pipelines.serving import application  # noqa: PLC0415

        given = self.config
        settings = application.Settings(
            application.absolute(given.index), _named(given.model, given), given.compare and application.absolute(given.compare),
            _named(given.compare_model, given), application.absolute(given.storage), self.tracking, application.absolute(given.cache), given.replicas,
            given.most_replicas, given.gpu, given.timeout, given.poll, given.waiting, given.body_limit,
            application.hashed_token(needed=not is_loopback(given.host)),
        )  # fmt: skip
        self.serve, self.ray = serve, ray
        try:
            serve.start(http_options={"host": given.host, "port": given.port, "request_timeout_s": given.timeout + 30}, logging_config=application.QUIET)
            serve.run(application.application(settings), name=application.NAME, route_prefix="/")
            url = f"http://{'127.0.0.1' if given.host in ('0.0.0.0', '::') else given.host}:{given.port}"
            _wait(url)
        except BaseException:
            self.__exit__()
            raise
        return url

    def __exit__(self, *_: object) -> None:
        self.serve.shutdown()


def _named(model: str, config: Config) -> str:
    """A model as replicas find it."""
    found = Path(model)
    return str(found.resolve()) if model and not model.startswith("models:/") and (found / "config.json").is_file() else model


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"nothing can listen at {host}:{port}: {error.strerror or error}") from error


def _wait(url: str) -> None:
    """Wait until the first version is open.

    Raises:
        ValueError: it cannot be opened; says why.
    """
    end, state = time.monotonic() + OPENING, dict[str, Any]()
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            with error:
                content = error.read()
            state = json.loads(content) if content[:1] == b"{" else {}
            faults = [each["refused"] for each in state.get("indexes", {}).values() if each.get("refused")]
            if faults:
                raise ValueError(faults[0]) from None
        except OSError:
            pass
        time.sleep(0.2)
    raise ValueError(f"the service was not ready after {OPENING:.0f} s: {state or 'it does not answer'}")
