"""All paths in a bucket, and buckets that do not answer or refuse requests."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data.filesystem import atomic_write, list_files, local_copy, move, remove, to_path, write_text
from data.locks import file_lock, is_leased, lease
from infra.storage import _said
from pipelines import train
from pipelines.console.cli import main
from tests.pipelines.training.disturbed import config, equal, final
from tests.servers import BUCKET, BUSY, FORBIDDEN, PASSWORD, S3, SECRET, Head, Tracking

ROOT = f"s3://{BUCKET}"
TRAIN = "train dah --source typeset --target handwritten --bits 16 --per-class 4 --epochs 2 --steps-per-epoch 10 --workers 0 --threads 1"


class Watch(threading.Thread):
    """Records the machine's process list and what commands print."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.shown: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    self.shown.add(" ".join(process.cmdline()))

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.join()


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Records while a test runs."""
    with Watch() as watching:
        yield watching


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], watch: Watch) -> Callable[[str], dict[str, Any]]:
    """Runs a command in this process; returns its result."""

    def run(line: str) -> dict[str, Any]:
        status = main([*line.split(), "--json"])
        shown = capsys.readouterr()
        watch.shown |= {shown.out, shown.err}
        assert status == 0, shown.err
        return json.loads(shown.out.splitlines()[-1])

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a command in this process that must fail; returns its line."""

    def run(line: str) -> str:
        assert main(line.split()) == 2
        said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("hashbridge: ")]
        assert len(said) == 1
        return said[0]

    return run


def test_the_whole_way_in_a_bucket(
    s3: S3, ray_cluster: Head, tracking_server: Tracking, command: Callable[[str], dict[str, Any]], watch: Watch,
    few_digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.account)
    data, runs = f"{ROOT}/way/digits", f"{ROOT}/way/runs"
    common = f"--dataset {data} --storage {runs}"
    for domain in ("typeset", "handwritten"):
        ingested = command(f"ingest {few_digits.parent / domain}.npz --dataset {data} --size 16")
        assert ingested["domains"][domain]["rows"]["train"] == 400
    trained = command(f"{TRAIN} {common} --no-plots")
    assert trained["checkpoint"] == f"{runs}/{trained['run_id']}/checkpoints/epoch-00002"
    assert command(f"evaluate {trained['run_id']} --storage {runs}")["metrics"] == trained["metrics"]
    tuned = command(f"tune {TRAIN[6:]} {common} --trials 1 --stop none".replace("--workers 0 ", ""))
    assert tuned["trials"]["complete"] == 1 and tuned["results"].startswith(runs)
    registered = command(f"register {trained['run_id']} --name digits --storage {runs}")
    assert command(f"promote digits --storage {runs}")["promoted"]
    encoded = command(f"encode {registered['uri']} {data} --domain typeset --split train --out {ROOT}/way/codes")
    assert encoded["codes"] == 400
    command(f"index {ROOT}/way/codes --out {ROOT}/way/typeset.index")
    found = command(f"search {ROOT}/way/typeset.index {data}#typeset/train#3-4 --model {registered['uri']} -k 1 --grid {ROOT}/way/found.png")
    assert [query["answers"][0]["distance"] for query in found["queries"]] == [0, 0]
    assert not list(tmp_path.iterdir())
    kept = {f"{name}": name.read_bytes() for folder in ("way", "mlflow") for name in list_files(to_path(f"{ROOT}/{folder}"))}
    logs = ray_cluster.folder
    kept |= {str(each): each.read_bytes() for each in logs.glob("session_latest/logs/**/*") if each.is_file()}
    kept |= {"database": tracking_server.database.dump().encode(), "shown": "\n".join(watch.shown).encode()}
    assert len(kept) > 50 and b"dah" in kept["database"] and b"pytest" in kept["shown"]
    assert not [name for name, content in kept.items() for secret in (PASSWORD, SECRET) if secret.encode() in content]


@pytest.mark.parametrize(
    "options",
    ["--tracking http://me:{}@127.0.0.1:9", "--storage s3://key:{}@bucket/runs", "--study-storage postgresql://me:{}@127.0.0.1:9/studies",
     "--study-storage postgresql://127.0.0.1:9/studies?user=me&password={}", "--trackin=http://me:{}@127.0.0.1:9"],
)  # fmt: skip
def test_a_password_on_a_command_line_is_refused_and_not_repeated(options: str, refused: Callable[[str], str]) -> None:
    said = refused(f"tune {TRAIN[6:].replace('--workers 0 ', '')} --dataset nowhere {options.format(PASSWORD)}")
    assert PASSWORD not in said and ("contains a password" in said or "no option --trackin" in said)


def test_no_message_repeats_a_password(digits: Path, tmp_path: Path, refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9")
    said = refused(f"{TRAIN} --dataset {digits} --storage {tmp_path}")
    assert "http://127.0.0.1:9: it does not answer" in said and PASSWORD not in said and not list(tmp_path.iterdir())


def after(done: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """Act as soon as a condition holds."""

    def watch() -> None:
        end = time.monotonic() + 60
        while not done() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_bucket_that_is_busy_for_a_while_costs_only_time(s3: S3, digits: Path, plain: dict[str, torch.Tensor]) -> None:
    storage = to_path(f"{ROOT}/busy")

    def busy() -> None:
        s3.refuse = lambda method, path: BUSY if s3.refused < 6 else None

    thread = after(lambda: s3.seen(f"{BUCKET}/busy/", "epoch-00001/digests.json"), busy)
    result = train.run(config(digits, storage, workers=0))
    thread.join()
    assert s3.refused == 6 and equal(final(storage / result["run_id"]), plain)
    assert len((storage / result["run_id"] / "progress.jsonl").read_text().splitlines()) == 3


def test_a_bucket_that_refuses_writes_keeps_what_it_has(
    s3: S3, digits: Path, plain: dict[str, torch.Tensor], refused: Callable[[str], str]
) -> None:  # fmt: skip
    storage = to_path(f"{ROOT}/refusing")

    def refuse() -> None:
        s3.refuse = lambda method, path: FORBIDDEN if method in ("PUT", "POST") and "progress" not in path else None

    thread = after(lambda: s3.seen(f"{BUCKET}/refusing/", "epoch-00001/digests.json"), refuse)
    with pytest.raises(OSError, match="checkpoint s3://.* could not be written .*the one before it is kept"):
        train.run(config(digits, storage, workers=0))
    thread.join()
    assert f"{ROOT}/refusing: the credentials lack the permission s3:PutObject (AccessDenied)" in refused(f"{TRAIN} --dataset {digits} --storage {storage}")
    s3.refuse = lambda method, path: None
    (run,) = [each.parent.name for each in storage.glob("*/config.json")]
    train.run(train.make_config({"resume": run, "storage": str(storage)}))
    assert equal(final(storage / run), plain)


@pytest.mark.parametrize(
    ("environment", "uri", "said"),
    [
        ({}, "s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"{ROOT}/x", "http://127.0.0.1:9 does not answer"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}, f"{ROOT}/x", "no credentials: set AWS_ACCESS_KEY_ID"),
        ({}, "gs://bucket/x", "is not a supported path"), ({}, "s3://", "is not a supported path"), ({}, f"{ROOT}/x", "no dataset at"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_place_is_said(
    environment: dict[str, str], uri: str, said: str, s3: S3, refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in refused(f"{TRAIN} --dataset {uri} --tracking none")


def test_what_else_a_bucket_may_answer() -> None:
    def told(status: int, code: str, operation: str = "ListObjectsV2", **headers: str) -> str:
        return _said({"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}, "b", operation)

    assert told(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-1"}) == "the bucket is in another region: set AWS_REGION=eu-west-1"
    assert "credentials are refused (InvalidAccessKeyId)" in told(403, "InvalidAccessKeyId")
    assert "permission s3:PutObject" in told(403, "AccessDenied", "PutObject")
    assert told(503, "SlowDown") == "ListObjectsV2 fails (SlowDown: m)"


def test_sources_and_configs_in_a_bucket_are_those_of_this_machine(s3: S3, tmp_path: Path, command: Callable[[str], dict[str, Any]]) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.random.default_rng(0).integers(0, 256, (40, 12, 12), np.uint8), y_train=np.arange(40) % 4)
    for label in range(4):
        for number in range(3):
            (tmp_path / "pets" / str(label)).mkdir(parents=True, exist_ok=True)
            Image.new("L", (12, 12), 20 * label + number).save(tmp_path / "pets" / str(label) / f"{number}.png")
    (tmp_path / "c.yaml").write_text("size: 12\nchannels: 1\n")
    there = to_path(f"{ROOT}/sources")
    for each in list_files(tmp_path):
        with atomic_write(there / each.relative_to(tmp_path).as_posix()) as copy:
            copy.write_bytes(each.read_bytes())
    digests = {
        command(f"ingest {folder}/{source} --domain d --dataset {folder}/set-{source} --config {folder}/c.yaml")["digest"]
        for source in ("a.npz", "pets") for folder in (tmp_path, there)
    }  # fmt: skip
    assert len(digests) == 2


def test_two_writers_of_a_dataset_take_turns(s3: S3) -> None:
    lock, held = to_path(f"{ROOT}/lock/.lock"), []

    def hold(name: int) -> None:
        with file_lock(lock):
            held.append(name)
            time.sleep(0.3)
            held.append(name)

    threads = [threading.Thread(target=hold, args=(name,)) for name in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert held[0::2] == held[1::2] and sorted(held[0::2]) == [0, 1, 2] and not lock.exists()


def test_a_lease_ends_with_its_holder(s3: S3, tmp_path: Path) -> None:
    for path in (tmp_path / "work.lease", to_path(f"{ROOT}/work.lease")):
        assert not is_leased(path)
        with lease(path):
            assert is_leased(path)
        assert not is_leased(path) and not path.exists()
        write_text(path, "1000.0")  # of a process that was killed long ago
        assert not is_leased(path)


def test_what_is_written_is_there_whole_or_not_at_all(s3: S3, tmp_path: Path) -> None:
    for folder in (tmp_path / "local", to_path(f"{ROOT}/whole")):
        write_text(folder / "a" / "b.txt", "old")
        with pytest.raises(RuntimeError), atomic_write(folder / "a" / "b.txt") as file:
            file.write_text("new, but only in part")
            raise RuntimeError
        assert (folder / "a" / "b.txt").read_text() == "old" and len(list_files(folder)) == 1
        move(folder / "a", folder / "c")
        with local_copy(folder / "c") as copy:
            assert [each.name for each in copy.iterdir()] == ["b.txt"]
        remove(folder / "c")
        assert not list_files(folder)
