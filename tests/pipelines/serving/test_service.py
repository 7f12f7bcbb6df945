"""The service on Ray Serve: answers of `search`, replicas that are killed under load, hostile requests."""

import contextlib
import http.client
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from pipelines import encode, index, search, serve, train
from pipelines.console.cli import main
from pipelines.retrieval.queries import load_queries
from pipelines.serving.environment import PORTS, free_ports
from tests.pipelines.serving.service import built_here, make_index, png, rows, until
from tests.pipelines.serving.test_api import HOSTILE
from tests.servers import ROOT, Head, free_port

BITS, NOTHING, OWN_PORTS = 32, "http://127.0.0.1:9", (8500, 9500)
REQUESTS, LEAK = 10_000, 200 * 2**20


@pytest.fixture(scope="module")
def made(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's encoder in ``runs``, and an index of two shards in ``i``."""
    folder = tmp_path_factory.mktemp("service")
    run = train.run(train.make_config({
        "method": "itq", "dataset": str(few_digits), "source": "typeset", "target": "handwritten", "bits": BITS, "workers": 0,
        "storage": str(folder / "runs"), "tracking": "none", "plots": False,
    }))["run_id"]  # fmt: skip
    encode.run(encode.Config(run, str(few_digits), out=str(folder / "codes"), split="train", storage=str(folder / "runs")))
    return folder


@pytest.fixture(scope="module")
def url(made: Path) -> Iterator[str]:
    """The address of the service, which is a process of its own with its own Ray, as a user starts it; a signal ends it and all that it started.

    It may have 4,096 open files, the environment names an HTTP proxy, which does not answer, so does the Ray cluster that was last started,
    and the ports are taken at which Ray Serve's own proxy would listen.
    """
    with built_here():
        index.run(index.Config(str(made / "codes"), out=str(made / "i"), shards=2))
    port, log = free_port(), made / "serve.log"
    temporary = Path(tempfile.mkdtemp(prefix="hb", dir="/tmp"))  # the path of a socket may have 107 characters
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"http_proxy": NOTHING, "https_proxy": NOTHING, "RAY_TMPDIR": str(temporary)}
    options = ["--port", port, "--storage", made / "runs", "--poll", 0.5, "--cache", made / "cache", "--body-limit", 1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "serve", *map(str, [made / "i", *options])], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=environment, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
        )  # fmt: skip
    taken = [socket.socket() for _ in OWN_PORTS]
    try:
        for own, number in zip(taken, OWN_PORTS, strict=True):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # somebody else has it
                own.bind(("127.0.0.1", number))
                own.listen()
        with contextlib.suppress(AssertionError):
            until(lambda: "serving at" in log.read_text() or process.poll() is not None, 180)
        assert process.poll() is None and "serving at" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        for own in taken:
            own.close()
        process.terminate()
        status = process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)
    assert status == 0 and not processes() and "ending ..." in log.read_text().splitlines()  # Ray may still say that a worker was killed


def test_what_cannot_be_served_is_refused_in_one_line(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray is started."""
    run = next(each.name for each in (made / "runs").iterdir())
    make_index(made / "other", rows(20), model="another-run")
    make_index(made / "one", rows(20), model=run)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, said in (
            ("nowhere", "no index at nowhere"), ("one --model nothing", "no run 'nothing'"), ("other", "no run 'another-run'"),
            (f"other --model {run}", f"the codes of the index are of another-run, not of {run}"), ("one --host 0.0.0.0", "off this machine a token is needed"),
            (f"one --port {port}", f"nothing can listen at 127.0.0.1:{port}"), ("one --host nowhere.invalid", "off this machine"),
            ("one --host ::1", "must be an IPv4 address"),
            ("one --port 0", "--port is 0"), ("one --replicas 0", "--replicas is 0"), ("one --timeout 0", "--timeout and --poll must be above 0"),
            ("one --compare-model x", "--compare-model is the model of a second index"), ("one --compare nowhere", "no index at nowhere"),
        ):  # fmt: skip
            monkeypatch.chdir(made)
            monkeypatch.delenv("HASHBRIDGE_TOKEN", raising=False)
            assert main(["serve", *options.split(), "--storage", str(made / "runs")]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert said in line
        monkeypatch.setenv("HASHBRIDGE_TOKEN", "short")
        assert main(["serve", "one", "--storage", str(made / "runs")]) == 2
        assert "HASHBRIDGE_TOKEN has 5 characters" in capsys.readouterr().err


def processes(name: str = "ServeReplica:hashbridge") -> list[psutil.Process]:
    """The service's processes of this name."""
    return [each for each in psutil.process_iter() if name in " ".join(_line(each))]


def _line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def ids(address: str, count: int) -> list[str]:
    return [row["id"] for row in httpx2.get(f"{address}/ids", params={"count": count, "seed": 1}).json()["ids"]]


def test_the_ports_of_a_service_are_given_to_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PORTS[0] >= 20000 and PORTS[-1] < 30000  # Ray's workers have those below, its replicas some above; Linux gives connections those from 32768
    assert len(set(free_ports(100))) == 100
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", free_port()))
        only = taken.getsockname()[1]
        monkeypatch.setattr("pipelines.serving.environment.PORTS", range(only, only + 1))
        with pytest.raises(ValueError, match=f"of the ports from {only} to {only} 0 are free, but 1 are needed"):
            free_ports(1)
    assert free_ports(1) == [only]


def test_a_proxy_that_does_not_start_is_told_in_one_line(ray_cluster: Head) -> None:
    import ray

    @ray.remote
    def ready() -> None:
        raise RuntimeError("HAProxy crashed during startup:\n[ALERT] cannot bind socket")

    told = r"try once more: HAProxy crashed during startup: \[ALERT\] cannot bind socket$"
    with pytest.raises(ValueError, match=told), serve._start_told(ray.exceptions.RayError):
        ray.get(ready.remote())


def test_answers_are_those_of_search(url: str, made: Path, few_digits: Path) -> None:
    found = search.run(search.Config(str(made / "i"), f"{few_digits}#handwritten/test#0-9", k=30, storage=str(made / "runs")))
    pictures = [httpx2.get(f"{url}/image/{name}") for name in ids(url, 5)]
    assert all(each.status_code == 200 and each.headers["content-type"] == "image/png" for each in pictures)
    files = [("image", ("digit.png", png(row))) for row in load_queries(f"{few_digits}#handwritten/test#0-9", (1, 16, 16)).x]
    told = httpx2.post(f"{url}/search", files=files, data={"k": "30"}).json()["queries"]
    assert [[(row["id"], row["distance"], row["class"]) for row in query["answers"]] for query in told] == [
        [(row["id"], row["distance"], row["class"]) for row in query["answers"]] for query in found["queries"]
    ]  # fmt: skip


@pytest.mark.parametrize("killed", ["i-shard-1", "encoder"])
def test_a_replica_is_killed_under_load(url: str, killed: str) -> None:
    """No request fails, and all answers are the same."""
    names = ids(url, 6)
    picture = httpx2.get(f"{url}/image/{names[0]}").content

    def ask(client: httpx2.Client, number: int) -> Any:
        if killed == "encoder":
            answer = client.post("/search", content=picture, headers={"content-type": "image/png"})
        else:
            answer = client.post("/search", json={"id": names[number % len(names)]})
        assert answer.status_code == 200, answer.text
        return answer.json()["queries"][0]["answers"]

    with httpx2.Client(base_url=url, timeout=60) as client:
        wanted = [ask(client, number) for number in range(len(names))]
    ended, wrong, counts = threading.Event(), list[Any](), [0] * 4

    def load(thread: int) -> None:
        with httpx2.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                number = counts[thread]
                try:
                    if ask(client, number) != wanted[number % len(names)]:
                        wrong.append(number)
                except Exception as error:
                    wrong.append(error)
                counts[thread] += 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: min(counts) >= 5)
    (process,) = processes(f"ServeReplica:hashbridge:{killed}")
    process.kill()
    process.wait(10)
    before = list(counts)
    until(lambda: min(now - then for now, then in zip(counts, before, strict=True)) >= 5, 60)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(processes(f"ServeReplica:hashbridge:{killed}")) == 1


def hostile(random_: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that nobody should send: method, path, body and headers."""
    kind = random_.randrange(8)
    junk = random_.randbytes(random_.choice((0, 1, 100, 3000, 60_000)))
    if kind == 0:
        name = random_.choice(("../" * 9 + "etc/passwd", "%2e%2e%2f" * 9 + "etc/passwd", "%00", "a" * 6000, "%ff%fe", "//etc/passwd"))
        return "GET", f"/image/{name}", b"", {}
    if kind == 1:
        return "POST", "/search", junk, {"content-type": random_.choice(("image/png", "image/jpeg", "application/json", "text/html", ""))}
    if kind == 2:
        return "POST", "/search", junk, {"content-type": "multipart/form-data; boundary=" + "x" * random_.choice((0, 1, 200))}
    if kind == 3:
        return random_.choice(("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")), random_.choice(("/", "/search", "/image/x")), b"", {}
    if kind == 4:
        return "GET", "/ids?" + random_.choice(("count=99999999", "seed=-1", "label=%00", "index=..", "count=1e9")), b"", {}
    if kind == 5:
        return "GET", "/about", b"", {"host": random_.choice(("evil.example", "", "127.0.0.1.evil.example")), "authorization": "Bearer " + "x" * 4000}
    if kind == 6:
        return "POST", "/search", json.dumps({"code": "0" * random_.randrange(40), "k": random_.choice((0, 10**30, "x", None, 7))}).encode(), {
            "content-type": "application/json"}  # fmt: skip
    bodies = [given["content"] for _, given in HOSTILE.values() if "content" in given and len(given["content"]) < 70_000]
    return "POST", "/search", random_.choice(bodies), {"content-type": random_.choice(("image/png", "application/json"))}


def test_hostile_requests(url: str) -> None:
    """No crash, no leak, no traceback to a client."""
    names, place = ids(url, 3), urlsplit(url).netloc
    wanted = httpx2.post(f"{url}/search", json={"id": names[0]}).json()["queries"]
    seen, wrong = list[int](), list[Any]()  # appending is safe between threads
    alive = {each.pid for each in processes()}

    def attack(seed: int, count: int) -> None:
        draw, connection = random.Random(seed), http.client.HTTPConnection(place, timeout=30)
        for _ in range(count):
            method, path, body, headers = hostile(draw)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                text = answer.read()
                seen.append(answer.status)
                if answer.status >= 500 or b"Traceback" in text or b'File "' in text:
                    wrong.append((method, path[:80], headers, answer.status, text[:300]))
            except (OSError, http.client.HTTPException):  # a body that is refused early
                seen.append(0)
                connection.close()
        connection.close()

    def wave(count: int) -> None:
        threads = [threading.Thread(target=attack, args=(seed, count // 4)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def memory() -> int:
        return sum(each.memory_info().rss for each in [*processes(), *processes("haproxy"), *processes("HAProxyManager")])

    wave(400)  # what is loaded at first use is no leak
    before = memory()
    wave(REQUESTS)
    grown = memory() - before
    statuses = Counter(seen)
    assert not wrong, wrong[:3]
    assert sum(statuses.values()) == REQUESTS + 400 and statuses[0] < REQUESTS // 50, statuses
    assert sum(statuses[status] for status in (400, 403, 404, 405, 413, 415, 422)) > 0.8 * REQUESTS, statuses
    assert grown < LEAK and {each.pid for each in processes()} == alive
    assert httpx2.post(f"{url}/search", json={"id": names[0]}).json()["queries"] == wanted
