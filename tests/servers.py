"""Servers on loopback: buckets that can refuse requests, a database, a Ray cluster, and a tracking server that can be killed."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from werkzeug.serving import make_server

from pipelines.serving.environment import free_ports

ROOT = Path(__file__).resolve().parent.parent
USER, PASSWORD, SECRET = "admin", "planted-tracking-password", "planted-bucket-secret"
TOKEN = "a-token-of-these-tests-" + "0" * 32  # of the Ray cluster

BUCKET = "hashbridge-tests"
BUSY = (503, "SlowDown", "Please reduce your request rate.")
FORBIDDEN = (403, "AccessDenied", "Access Denied")


def free_port() -> int:
    """A free port."""
    return free_ports(1)[0]


def wait_for(url: str, token: str = "", timeout: float = 60) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {}), timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} did not answer in {timeout} s")


class S3:
    """moto's server in a thread.

    Attributes:
        refuse: given a request's method and path, what it is refused with: status, code and message; None where it is not.
        refused: requests that were.
    """

    def __init__(self, port: int) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.refuse: Callable[[str, str], tuple[int, str, str] | None] = lambda method, path: None
        self.refused, self.answered = 0, list[str]()
        self.server = make_server("127.0.0.1", port, self._answer, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        refusal = self.refuse(environment["REQUEST_METHOD"], environment["PATH_INFO"])
        if refusal is None:
            self.answered.append(environment["PATH_INFO"])
            return self.inner(environment, start)
        self.refused += 1
        status, code, message = refusal
        start(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]

    def seen(self, beginning: str, end: str) -> bool:
        """Whether an object with such a name was requested or stored."""
        return any(path.startswith(f"/{beginning}") and path.endswith(end) for path in list(self.answered))

    def stop(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.thread.join()


class Database:
    """A PostgreSQL server, if the machine has its programs and they start; otherwise ``uri`` is SQLite's."""

    def __init__(self, folder: Path) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.uri = f"sqlite:///{folder}/server.db"
        self.folder = Path(tempfile.mkdtemp(prefix="hashbridge-postgres-"))
        if shutil.which("initdb") and shutil.which("postgres"):
            try:
                self._start(free_port())
            except (OSError, LookupError, subprocess.SubprocessError) as error:
                warnings.warn(f"PostgreSQL is here, and does not start ({error}): SQLite in its place", stacklevel=2)

    def _start(self, port: int) -> None:
        other: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            shutil.chown(self.folder, "nobody")
            other = {"user": "nobody", "extra_groups": []}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.folder} | other
        subprocess.run(["initdb", "-D", "data", "-U", "mlflow", "--auth=trust", "--no-sync"], check=True, **quiet)
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(["postgres", "-D", "data", "-p", str(port), *arguments], **quiet)
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                self.uri = f"postgresql://mlflow@127.0.0.1:{port}/postgres"
                return
            time.sleep(0.1)
        raise OSError("its port stays closed")

    def dump(self) -> str:
        """The content of all tables, as text."""
        from sqlalchemy import MetaData, create_engine

        engine, tables = create_engine(self.uri), MetaData()
        tables.reflect(engine)
        with engine.connect() as connection:
            text = "\n".join(str(row) for table in tables.tables.values() for row in connection.execute(table.select()))
        engine.dispose()
        return text

    def stop(self) -> None:
        """Stop the server and remove its files."""
        if self.process:
            self.process.terminate()
            self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


class Head:
    """The head of a Ray cluster with two CPUs, token authentication and the jobs' server; nodes can join it and be killed.

    Attributes:
        address: of the cluster, for ``RAY_ADDRESS``.
        dashboard: its port, on which jobs are submitted.
        folder: of Ray's sessions, with its logs.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hb", dir="/tmp"))  # the path of a socket may have 107 characters
        port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        noticing = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}
        self.process = self._start(
            "--head", f"--port={port}", "--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}", f"--system-config={json.dumps(noticing)}",
        )  # fmt: skip
        wait_for(f"http://127.0.0.1:{self.dashboard}/api/version", TOKEN)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).parent / "ray")
        common = ["--block", "--disable-usage-stats", "--include-log-monitor=false", "--object-store-memory=800000000"]
        common.append(f"--dashboard-agent-listen-port={free_port()}")
        output = (self.folder / f"start-{len(list(self.folder.glob('start-*')))}.log").open("wb")
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # its actors would look for that cluster, and trainings end late
        return subprocess.Popen([ray, "start", *common, *options], env=own, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def add_node(self) -> subprocess.Popen[bytes]:
        """A second node with one CPU."""
        return self._start(f"--address={self.address}", "--num-cpus=1")

    def stop(self) -> None:
        """Kill the head with all its processes."""
        kill_tree(self.process.pid)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill_tree(pid: int) -> str:
    """Kill a process and all its descendants; returns their names."""
    with contextlib.suppress(psutil.Error):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        names = [" ".join(each.cmdline()[:1]) for each in family if each.is_running()]
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(family, 30)
        return ", ".join(names)
    return ""


class Tracking:
    """MLflow's own server with basic auth, as in infra/mlflow, with artifacts in a bucket; it can be killed and restarted."""

    def __init__(self, folder: Path, database: Database, artifacts: str) -> None:
        self.folder, self.database, self.artifacts, self.port = folder, database, artifacts, free_port()
        self.uri, self.account = f"http://127.0.0.1:{self.port}", f"http://{USER}:{PASSWORD}@127.0.0.1:{self.port}"
        auth = (ROOT / "infra" / "mlflow" / "auth.ini").read_text().replace("/var/lib/mlflow", str(folder))
        (folder / "auth.ini").write_text(auth)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        own = {
            "BACKEND_STORE_URI": self.database.uri, "ARTIFACTS_DESTINATION": self.artifacts, "AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "AUTH_ADMIN_USERNAME": USER, "AUTH_ADMIN_PASSWORD": PASSWORD, "FLASK_SERVER_SECRET_KEY": "a key of these tests",
            "SERVER_ENABLE_JOB_EXECUTION": "false",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--app-name", "basic-auth"],
            cwd=self.folder, env=os.environ | {f"MLFLOW_{name}": value for name, value in own.items()}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(f"{self.uri}/health")

    def kill(self) -> None:
        """Kill it with all its processes."""
        kill_tree(self.process.pid)
        self.process.wait()
