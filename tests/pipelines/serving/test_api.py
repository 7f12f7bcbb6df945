"""The service's answers, in one process: against brute force, `search`, and what must be refused."""

import asyncio
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx2 import Client
from PIL import Image

from pipelines.retrieval import index_changes
from pipelines.retrieval.sharded_index import open_index
from pipelines.serving.guard import Limits
from tests.pipelines.serving.service import BITS, CLASSES, make_index, rows, running, service, until, write_images


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 300 rows in three shards; the first five rows have images."""
    folder = tmp_path_factory.mktemp("served")
    make_index(folder / "i", rows(300, files=write_images(folder / "images", 5)), 3)
    return folder / "i"


@pytest.fixture(scope="module")
def client(index: Path) -> Iterator[Client]:
    with running(service(index)[0]) as client:
        yield client


def brute(table: Any, code: bytes, k: int, kept: Any = lambda row: True) -> list[tuple[int, str]]:
    """The nearest rows of a table, ties by id."""
    query = np.frombuffer(code, np.uint8)
    far = [(int(np.bitwise_count(np.frombuffer(row["code"], np.uint8) ^ query).sum()), row["id"]) for row in table.to_pylist() if kept(row)]
    return sorted(far)[:k]


def pairs(answer: Any) -> list[tuple[int, str]]:
    return [(each["distance"], each["id"]) for each in answer["queries"][0]["answers"]]


@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize(("label", "domain"), [("", ""), ("dog", ""), ("", "photo"), ("owl", "sketch")])
def test_answers_are_those_of_brute_force(client: Client, k: int, label: str, domain: str) -> None:
    table = rows(300)

    def kept(row: Any) -> bool:
        of = row["origin"].split("#")[1].split("/")[0] if "#" in row["origin"] and int(row["origin"].split("#")[2]) >= 5 else ""
        return (not label or row["label"] == CLASSES.index(label)) and (not domain or of == domain)

    for code in (b"\0\1\2\3", b"\3\3\0\1"):
        given = {"code": code.hex(), "k": k, "label": label, "domain": domain}
        answer = client.post("/search", json=given).json()
        assert pairs(answer) == brute(table, code, k, kept)
        labels = {row["id"]: row["label"] for row in table.to_pylist()}
        assert all(each["label"] == labels[each["id"]] for each in answer["queries"][0]["answers"])
        assert {each["class"] for each in answer["queries"][0]["answers"]} <= {*CLASSES, ""}


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_indexes_answer_as_search_does(kind: str, tmp_path: Path) -> None:
    make_index(tmp_path / "i", rows(300), 2, kind)
    code = np.array([[0, 1, 2, 3]], np.uint8)
    found = open_index(tmp_path / "i").search(code, 10)
    with running(service(tmp_path / "i", deployments=1)[0]) as client:
        client.post("/search", json={"code": "03" * 4, "k": 300})  # a wide search leaves the next as it is
        told = client.post("/search", json={"code": code.tobytes().hex()}).json()
        assert pairs(told) == [(far, row["id"]) for far, row in zip(found.distances[0], found.rows[0], strict=True)]


def test_images_ids_and_codes_ask_the_same(client: Client, index: Path) -> None:
    files = sorted((index.parent / "images").iterdir())
    single = [client.post("/search", content=file.read_bytes(), headers={"content-type": "image/png"}, params={"k": 4}).json() for file in files]
    form = client.post("/search", files=[("image", (file.name, file.read_bytes())) for file in files], data={"k": "4"}).json()
    assert [each["answers"] for each in form["queries"]] == [each["queries"][0]["answers"] for each in single]
    assert [each["query"] for each in form["queries"]] == [f"image {number}" for number in range(1, 6)]
    row = rows(300).to_pylist()[17]
    by_id, by_code = (client.post("/search", json=given).json() for given in ({"id": row["id"]}, {"code": row["code"].hex()}))
    assert by_id["queries"][0]["answers"] == by_code["queries"][0]["answers"] and by_id["queries"][0]["answers"][0]["distance"] == 0
    assert by_id["version"] == 1 and by_id["model"] == "run" and by_id["bits"] == BITS and set(by_id["milliseconds"]) == {"encode", "search", "total"}


def test_pictures_are_of_images_of_the_index_alone(client: Client, index: Path) -> None:
    table = rows(300)["id"].to_pylist()
    answer = client.get(f"/image/{table[0]}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
    stored = np.asarray(Image.open(sorted((index.parent / "images").iterdir())[0]), float)
    assert np.abs(np.asarray(Image.open(io.BytesIO(answer.content)).convert("L"), float) - stored).mean() < 8
    for wrong in ("../images/000.png", "%2e%2e/%2e%2e/etc/passwd", str(index.parent / "images" / "000.png"), "/etc/passwd", "a" * 9000, "%00", table[0] + "x"):
        told = client.get(f"/image/{wrong}")
        assert told.status_code == 404 and "error" in told.json(), wrong
    gone = client.get(f"/image/{table[100]}")  # its dataset is not there
    assert gone.status_code == 404 and "there is no picture" in gone.json()["error"]


def test_about_ids_and_metrics(client: Client) -> None:
    (about,) = client.get("/about").json()["indexes"]
    assert about["codes"] == 300 and about["classes"] == CLASSES and about["domains"] == ["photo", "sketch"] and about["images"]
    ids = client.get("/ids", params={"count": 9, "label": "cat", "seed": 4}).json()["ids"]
    assert len({each["id"] for each in ids}) == 9 and {each["class"] for each in ids} == {"cat"}
    assert ids == client.get("/ids", params={"count": 9, "label": "cat", "seed": 4}).json()["ids"]

    def counted() -> float:
        return float(next(line.split()[-1] for line in client.get("/metrics").text.splitlines() if 'requests_total{path="/about",status="200"}' in line))

    before = counted()
    client.get("/about")
    assert counted() == before + 1
    for path in ("/", "/docs", "/openapi.json", "/page/page.js", "/page/page.css"):
        assert client.get(path).status_code == 200
    assert "http" not in client.get("/docs").text and "/search" in client.get("/openapi.json").json()["paths"]


def bomb() -> bytes:
    """A PNG file of a few kilobytes that says it has 10^10 pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = (100_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}
HOSTILE = {  # each with its status
    "no image": (422, {"content": b"not an image", "headers": PNG}), "empty body": (422, {"content": b"", "headers": PNG}),
    "a bomb": (422, {"content": bomb(), "headers": PNG}), "no JSON": (422, {"content": b"{", "headers": JSON}),
    "deep JSON": (422, {"content": b"[" * 60_000, "headers": JSON}), "a list": (422, {"json": [1]}), "no query": (422, {"json": {"k": 3}}),
    "two queries": (422, {"json": {"id": "x", "code": "00"}}), "an unknown id": (404, {"json": {"id": "../../etc/passwd"}}),
    "a long id": (404, {"json": {"id": "x" * 60_000}}), "a surrogate": (404, {"json": {"id": "\ud800"}}), "an id of numbers": (422, {"json": {"id": 5}}),
    "a short code": (422, {"json": {"code": "00"}}), "no code": (422, {"json": {"code": "zz" * (BITS // 8)}}),
    "k 0": (422, {"json": {"code": "00000000", "k": 0}}),
    "k true": (422, {"json": {"code": "00000000", "k": True}}), "k 1.5": (422, {"json": {"code": "00000000", "k": 1.5}}),
    "large k": (422, {"json": {"code": "00000000", "k": 10**400}}), "negative k": (422, {"json": {"code": "00000000", "k": -1}}),
    "no class": (422, {"json": {"code": "00000000", "label": "cow"}}), "no domain": (422, {"json": {"code": "00000000", "domain": "x"}}),
    "no index": (404, {"json": {"code": "00000000", "index": "x"}}), "an odd field": (422, {"json": {"code": "00000000", "model": "x"}}),
    "large JSON": (413, {"content": b" " * 70_000, "headers": JSON}), "large body": (413, {"content": bytes(2**20 + 1), "headers": PNG}),
    "other content": (415, {"content": b"x", "headers": {"content-type": "text/plain"}}),
    "a form without boundary": (422, {"content": b"x", "headers": {"content-type": "multipart/form-data"}}),
    "a broken form": (422, {"content": b"--x\r\nfoo", "headers": {"content-type": "multipart/form-data; boundary=x"}}),
    "too many images": (422, {"files": [("image", (f"{number}", b"x")) for number in range(9)]}),
    "a file elsewhere": (422, {"files": [("id", ("x", b"x"))]}), "one bad of two": (422, {"files": [("image", ("x", b"x")), ("image", ("y", b"y"))]}),
    "many fields": (422, {"data": {f"f{number}": "x" for number in range(99)}, "files": [("image", ("x", b"x"))]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(index: Path) -> Iterator[Client]:
    with running(service(index, limits=Limits(body=2**20, images=8))[0]) as client:
        yield client


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_in_one_line(small: Client, name: str) -> None:
    status, given = HOSTILE[name]
    if "json" in given:
        given = {"content": json.dumps(given["json"]), "headers": JSON}
    answer = small.post("/search", **given)
    assert answer.status_code == status, answer.text
    (reason,) = answer.json().values()
    assert "\n" not in reason and "Traceback" not in reason and len(reason) < 300
    assert small.post("/search", json={"code": "00000000"}).status_code == 200


def test_paths_and_methods_that_are_not_there(client: Client) -> None:
    assert [client.get(path).status_code for path in ("/search", "/nothing", "/page/..%2fapi.py", "/page/../api.py", "/ids?count=0", "/ids?label=x")] == [
        405, 404, 404, 404, 422, 422,
    ]  # fmt: skip
    hosts = {"evil.example": 403, "127.0.0.1.evil.example": 403, "10.0.0.1:8000": 403, "127.0.0.1:8000": 200, "127.0.0.5": 200, "[::1]:8000": 200}
    assert {host: client.get("/about", headers={"host": host}).status_code for host in hosts} == hosts  # a foreign name may point here


def test_a_token_is_needed_for_all_data(index: Path) -> None:
    with running(service(index, token="a secret of some length")[0]) as client:
        for path in ("/about", "/ids", "/metrics", "/image/x", "/search"):
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "a secret of some length"}, {"authorization": "Basic x"}):
                told = client.get(path, headers=header)
                assert told.status_code == 401 and told.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer a secret of some length", "host": "search.example"}
        assert client.get("/about", headers=right).status_code == 200 and client.get("/").status_code == 200


def test_more_requests_than_are_worked_on_are_told_to_come_again(index: Path) -> None:
    app, gateway = service(index, limits=Limits(waiting=2))
    with running(app) as client:
        wait, answers = threading.Event(), list[Any]()
        find, gateway.encoder.served.encode = gateway.encoder.served.encode, None

        async def slow(model: Any, images: list[bytes]) -> Any:
            while not wait.is_set():
                await asyncio.sleep(0.01)
            return await find(model, images)

        gateway.encoder.served.encode = slow
        image = next((index.parent / "images").iterdir()).read_bytes()
        threads = [threading.Thread(target=lambda: answers.append(client.post("/search", content=image, headers=PNG))) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: client.get("/about").status_code == 503)
            assert client.get("/about").headers["retry-after"] == "1" and client.get("/healthz").status_code == 200
        finally:
            wait.set()
            for thread in threads:
                thread.join()
        assert [each.status_code for each in answers] == [200, 200] and client.get("/about").status_code == 200


def test_a_time_limit_and_a_failure_are_one_line(index: Path) -> None:
    app, gateway = service(index, timeout=0.2)
    with running(app) as client:
        image = next((index.parent / "images").iterdir()).read_bytes()
        gateway.encoder.faults = [ConnectionError("dead")] * 99
        told = client.post("/search", content=image, headers=PNG)
        assert told.status_code == 504 and told.json() == {"error": "no answer within 0.2 s"}
        gateway.encoder.faults = [KeyError("a secret inside")]
        told = client.post("/search", content=image, headers=PNG)
        assert told.status_code == 500 and told.json() == {"error": "the request failed; the server's log says why"}
        (side,) = gateway.sides.values()
        side.shards[0].faults = [ConnectionError("dead")] * 99
        assert client.post("/search", json={"code": "00000000"}).status_code == 504 and len(gateway.version("").queries.waiting) == 0
        gateway.encoder.faults = side.shards[0].faults = []
        assert client.post("/search", content=image, headers=PNG).status_code == 200


def test_an_index_of_features_is_asked_with_ids(index: Path) -> None:
    app, gateway = service(index)
    gateway.encoder.served.shape = (64,)
    with running(app) as client:
        told = client.post("/search", content=b"x", headers=PNG)
        assert told.status_code == 422 and told.json() == {"error": "run takes feature vectors, not images: ask with an id or a code"}
        assert not client.get("/about").json()["indexes"][0]["images"] and client.post("/search", json={"code": "00000000"}).status_code == 200


def test_codes_of_another_length_are_not_served(index: Path) -> None:
    _, gateway = service(index)
    gateway.encoder.served.bits = 64
    (side,) = gateway.sides.values()
    asyncio.run(gateway.renew(side))
    assert side.now is None and side.fault == "the model gives 64 bits, the index holds 32"
    ready, state = gateway.health()
    assert not ready and state["status"] == "starting" and state["indexes"]["i"]["refused"] == side.fault


def test_a_dead_shard_is_asked_again(index: Path) -> None:
    app, gateway = service(index)
    with running(app) as client:
        wanted = client.post("/search", json={"code": "00010203"}).json()["queries"]
        (side,) = gateway.sides.values()
        for shard in side.shards:
            shard.faults = [ConnectionError("dead")] * 2
        assert client.post("/search", json={"code": "00010203"}).json()["queries"] == wanted and gateway.retried == 4


def test_an_index_is_replaced_while_clients_search(tmp_path: Path) -> None:
    """Every answer is of one version whole: the rows of a version are named by it, and all k nearest are at distance 0."""
    def version(number: int, shards: int) -> None:
        import pyarrow as pa

        ids = [f"{number} {row}" for row in range(40)]
        table = pa.table([ids, [0] * 40, [bytes([number] * 4)] * 40, ids], schema=rows(1).schema)
        make_index(tmp_path / "i", table, shards)

    version(0, 3)
    app, gateway = service(tmp_path / "i", poll=0.01)
    with running(app) as client:
        seen, wrong, ended = set[int](), list[Any](), threading.Event()

        def search() -> None:
            while not ended.is_set():
                answer = client.post("/search", json={"code": "00" * 4, "k": 40})
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                told = answer.json()
                numbers = {int(row["id"].split()[0]) for row in told["queries"][0]["answers"]}
                if numbers != {told["version"] - 1} or len(told["queries"][0]["answers"]) != 40:
                    wrong.append(told)
                seen.add(told["version"])

        threads = [threading.Thread(target=search) for _ in range(8)]
        for thread in threads:
            thread.start()
        for number in range(1, 7):
            version(number, 1 + number % 4)
            end = time.monotonic() + 10
            while gateway.version("").served.manifest["version"] != number + 1:
                assert time.monotonic() < end
                time.sleep(0.005)
        ended.set()
        for thread in threads:
            thread.join()
        assert not wrong and {1, 7} & seen and len(seen) >= 3


def test_the_disk_goes_and_comes_back(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    make_index(folder, rows(300), 2)
    app, gateway = service(folder)
    with running(app) as client:
        wanted = client.post("/search", json={"code": "00010203", "k": 20}).json()["queries"]
        folder.rename(tmp_path / "away")
        until(lambda: client.get("/healthz").json()["status"] == "degraded")
        state = client.get("/healthz").json()["indexes"]["i"]
        assert "no index at" in state["refused"] and client.post("/search", json={"code": "00010203", "k": 20}).json()["queries"] == wanted
        assert 'hashbridge_index_refused{index="i"} 1.0' in client.get("/metrics").text
        (tmp_path / "away").rename(folder)
        until(lambda: client.get("/healthz").json()["status"] == "ok")
        first = next(folder.glob("*.faiss"))
        index_changes.add(folder, rows(5, 1).set_column(0, "id", [[f"new {n}" for n in range(5)]]).cast(rows(1).schema), {
            "bits": str(BITS), "model": "run", "classes": json.dumps(CLASSES)})  # fmt: skip
        damaged = json.loads((folder / "manifest.json").read_text())
        until(lambda: gateway.version("").served.manifest["version"] == damaged["version"])
        assert first.exists() and client.get("/about").json()["indexes"][0]["codes"] == 305
        (folder / damaged["shards"][0]["codes"]).write_bytes(b"damaged")
        damaged["version"] += 1
        damaged["shards"][0]["sha256"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(damaged))
        until(lambda: client.get("/healthz").json()["status"] == "degraded")
        assert client.get("/about").json()["indexes"][0]["codes"] == 305 and client.get("/about").json()["indexes"][0]["version"] == damaged["version"] - 1
