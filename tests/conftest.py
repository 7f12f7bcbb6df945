"""Shared fixtures: one Ray cluster and one prepared dataset for the whole session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import BUCKET, PASSWORD, ROOT, S3, SECRET, TOKEN, USER, Database, Head, Tracking, free_port

if TYPE_CHECKING:
    import torch

os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="1", RAY_worker_niceness="0")

S3_PORT = free_port()  # what Ray's processes, which keep the environment that they are started with, must know from the beginning
os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{S3_PORT}", AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1")
os.environ.update(MLFLOW_TRACKING_USERNAME=USER, MLFLOW_TRACKING_PASSWORD=PASSWORD)
NO_RAY = "127.0.0.1:9"  # nothing listens there: a test that needs Ray asks for the fixture
os.environ.update(GOMP_SPINCOUNT="1000")  # as the command line does: two processes share two cores
os.environ.update(RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0")  # one actor less for each training
os.environ.update(RAY_ADDRESS=NO_RAY, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)

SHARED = ROOT.parent / "shared" / "data"
GROUPS = {  # by fixture; a test's first counts
    "ray_cluster": "cluster", "s3_server": "servers", "by_two": "two workers", "trained": "flow", "good": "bad input", "runs": "promotion",
    "sample": "embedding", "browser": "page", "made": "service",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that need Ray to one of pytest-xdist's processes, likewise others that share what is started or computed once."""
    for item in items:
        wanted = getattr(item, "fixturenames", ())
        group = next((group for fixture, group in GROUPS.items() if fixture in wanted), "")
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make MLflow's new SQLite files of this process copies of its first: to create the tables takes MLflow five seconds for each."""
    from pipelines.registry import connection

    first, set_uri = tmp_path_factory.mktemp("mlflow") / "first.db", connection._set_uri

    def copied(mlflow: Any, uri: str) -> None:
        file = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and file.parent.is_dir() and not file.exists():
            if not first.exists():
                set_uri(mlflow, f"sqlite:///{first}")
                mlflow.MlflowClient(f"sqlite:///{first}").search_experiments()
            shutil.copyfile(first, file)
        set_uri(mlflow, uri)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connection, "_set_uri", copied)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Train in this process on one thread: pytest-xdist's processes share the cores, and the second thread of each took a third more of them."""
    import torch

    from pipelines import train

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        cores = train._cores
        patched.setattr(train, "_cores", lambda options: cores(options) if options.workers else 1)
        yield


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The one Ray cluster of the session. A test without this fixture cannot start Ray."""
    import ray

    _only_here(tmp_path_factory, "the Ray cluster")
    head = Head()
    os.environ["RAY_ADDRESS"] = head.address
    ray.init(log_to_driver=False, logging_level="ERROR")
    yield head
    ray.shutdown()
    os.environ["RAY_ADDRESS"] = NO_RAY
    head.stop()


def _only_here(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Fail if another of pytest-xdist's processes has started this too: its groups do nothing under some versions of pytest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        (tmp_path_factory.getbasetemp().parent / f"started: {name}").open("x").close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits, both domains, as a dataset, which the first of pytest-xdist's processes to ask for it makes for all."""
    from data.locks import file_lock
    from pipelines import ingest

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data" / "digits"
    root.parent.mkdir(exist_ok=True)
    with file_lock(root.parent / "lock"):
        if not (root / "manifest.json").exists():
            ingest.run(ingest.Config("digits", dataset=str(root)))
    return root


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 training and 60 test images of each domain of the embedded digits, at 16x16."""
    import numpy as np

    from data.digits import read
    from pipelines import ingest

    folder = tmp_path_factory.mktemp("few")
    for domain in ("typeset", "handwritten"):
        splits = {split: read(domain, split, 0, count) for split, count in (("train", 400), ("test", 60))}
        arrays = {f"{letter}_{split}": part for split, pair in splits.items() for letter, part in zip("xy", pair, strict=True)}
        np.savez(folder / f"{domain}.npz", **arrays)
        ingest.run(ingest.Config(str(folder / f"{domain}.npz"), domain=domain, dataset=str(folder / "digits"), size=16))
    return folder / "digits"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two domains, ``photo`` and ``art``, of 90 made photographs each, of three classes, stored as JPEG files."""
    import numpy as np
    from PIL import Image

    from pipelines import ingest

    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for domain in ("photo", "art"):
        for i in range(90):
            file = folder / domain / f"class{i % 3}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
            coarse.resize((90, 70)).save(file)
        ingest.run(ingest.Config(str(folder / domain), domain=domain, dataset=str(folder / "set"), size=80))
    return folder / "set"


@pytest.fixture(scope="session")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Parameters of the short run of ``tests.pipelines.training.disturbed`` by two processes of torchrun: Ray's workers must give the same."""
    from tests.pipelines.training.disturbed import OPTIONS, final

    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name not in ("method", "plots", "workers")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipelines"]
    arguments = ["train", "dah", f"--dataset={digits}", f"--storage={tmp_path_factory.mktemp('undisturbed')}", "--workers=0", "--no-plots", "--json"]
    done = subprocess.run([*command, *arguments, *options], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1  # the other rank is silent
    return final(Path(json.loads(lines[0])["checkpoint"]).parent.parent)


@pytest.fixture(scope="session")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Parameters of the same run in a plain process."""
    from pipelines import train
    from tests.pipelines.training.disturbed import config, final

    return final(Path(train.run(config(digits, tmp_path_factory.mktemp("plain"), workers=0))["checkpoint"]).parent.parent)


@pytest.fixture(scope="session")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of a worse and of a better encoder, their storage and tracking URI."""
    from pipelines import train

    storage = tmp_path_factory.mktemp("promotion")
    made = {"storage": str(storage), "uri": f"sqlite:///{storage}/mlflow.db"}
    for name, method in (("worse", "lsh"), ("better", "itq")):
        made[name] = train.run(train.make_config({
            "method": method, "dataset": str(digits), "source": "typeset", "target": "handwritten", "bits": 32, "workers": 0,
            "storage": str(storage), "tracking": "none", "plots": False,
        }))["run_id"]  # fmt: skip
    return made


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; skips the test if it does not exist."""
    if not (SHARED / "usps.npz").exists():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """The S3 server, with a bucket."""
    import boto3

    server = S3(S3_PORT)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tracking_server(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """A tracking server with a database and its artifacts in the bucket."""
    folder = tmp_path_factory.mktemp("tracking")
    database = Database(folder)
    server = Tracking(folder, database, f"s3://{BUCKET}/mlflow")
    yield server
    server.kill()
    database.stop()


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """The S3 server, which accepts every request before and after the test."""
    yield s3_server
    s3_server.refuse, s3_server.refused = lambda method, path: None, 0


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m pipelines` in a process of its own."""

    def run(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ | environment, check=False,
        )  # fmt: skip

    return run
