"""A service that follows a champion: real models in a registry, in one process."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client

from pipelines import encode, index, promote, register, search
from pipelines.registry.encoders import Resolved, check_encodes, resolve
from pipelines.retrieval.queries import load_queries
from pipelines.serving.api import create_app
from pipelines.serving.encoders import Encoders
from pipelines.serving.gateway import Gateway, Side
from pipelines.serving.guard import Limits
from pipelines.serving.served import Choice
from pipelines.serving.shards import Shards
from tests.pipelines.serving.service import Handle, png, running, until

NAME, ALIAS = "served", "models:/served@champion"


def promoted(runs: dict[str, str], run: str) -> None:
    """Register a run and make it the champion."""
    register.run(register.Config(runs[run], name=NAME, storage=runs["storage"], tracking=runs["uri"]))
    promote.run(promote.Config(NAME, tracking=runs["uri"]))


def indexed(runs: dict[str, str], digits: Path, folder: Path, codes: str) -> None:
    """Encode a split with the champion, and make it the index, or its next version."""
    encode.run(encode.Config(ALIAS, str(digits), out=str(folder / codes), domain="typeset", split="test", tracking=runs["uri"]))
    index.run(index.Config(str(folder / codes), out=str(folder / "i")))


def served(runs: dict[str, str], folder: Path) -> tuple[Any, Gateway]:
    choice = Choice(str(folder / "i"), ALIAS, runs["storage"], runs["uri"])
    encoders = Encoders(runs["storage"], runs["uri"], str(folder / "cache"))
    gateway = Gateway([Side("i", choice, [Handle(Shards())])], Handle(encoders), (ConnectionError,), 0.1)
    return create_app(gateway, Limits()), gateway


def asked(client: Client, images: list[bytes]) -> list[list[tuple[str, int]]]:
    answer = client.post("/search", files=[("image", (str(number), image)) for number, image in enumerate(images)], data={"k": "20"})
    assert answer.status_code == 200, answer.text
    return [[(row["id"], row["distance"]) for row in query["answers"]] for query in answer.json()["queries"]]


def test_a_service_follows_the_champion(digits: Path, runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(runs, "worse")
    indexed(runs, digits, tmp_path, "codes-1")
    queries = f"{digits}#handwritten/test#0-7"

    def searched() -> list[list[tuple[str, int]]]:
        found = search.run(search.Config(str(tmp_path / "i"), queries, ALIAS, 20, tracking=runs["uri"]))
        return [[(row["id"], row["distance"]) for row in query["answers"]] for query in found["queries"]]

    images = [png(row) for row in load_queries(queries, (1, 32, 32)).x]
    app, gateway = served(runs, tmp_path)
    with running(app) as client:
        before = searched()
        assert asked(client, images) == before and asked(client, images[3:4]) == before[3:4]
        state = client.get("/healthz").json()["indexes"]["i"]
        assert state["model"] == f"models:/{NAME}/1" == gateway.version("").served.manifest["model"]

        promoted(runs, "better")
        until(lambda: client.get("/healthz").json()["status"] == "degraded")
        assert client.get("/healthz").json()["indexes"]["i"]["refused"] == (
            f"the codes of the index are of models:/{NAME}/1, not of models:/{NAME}/2: search with the model that encoded it"
        )
        assert asked(client, images) == before
        with pytest.raises(ValueError, match=f"the codes of the index are of models:/{NAME}/1, not of models:/{NAME}/2"):
            searched()

        ended, answers, wrong = threading.Event(), list[Any](), list[str]()

        def load() -> None:
            while not ended.is_set():
                try:
                    answers.append(asked(client, images))
                except AssertionError as error:
                    wrong.append(str(error))

        thread = threading.Thread(target=load)
        thread.start()
        indexed(runs, digits, tmp_path, "codes-2")
        until(lambda: client.get("/healthz").json()["indexes"]["i"]["model"] == f"models:/{NAME}/2")
        after = searched()
        until(lambda: answers[-1] == after)
        ended.set()
        thread.join()
        assert not wrong and before != after and all(each in (before, after) for each in answers)

        def away(uri: str) -> None:
            raise ValueError(f"tracking server {uri}: it does not answer")

        with monkeypatch.context() as patched:
            patched.setattr("pipelines.registry.encoders.connect", away)
            until(lambda: "does not answer" in client.get("/healthz").json()["indexes"]["i"]["registry"])
            assert asked(client, images) == after and client.get("/healthz").json()["status"] == "degraded"
            gateway.encoder.served = Encoders(runs["storage"], runs["uri"], str(tmp_path / "cache"))  # as a replica that is started again
            assert asked(client, images) == after
        until(lambda: client.get("/healthz").json()["status"] == "ok")


def test_names_of_one_encoder(runs: dict[str, str]) -> None:
    promoted(runs, "worse")  # or what the test above has promoted stays
    alias = resolve(ALIAS, runs["storage"], runs["uri"])
    assert alias.name.startswith(f"models:/{NAME}/") and resolve(alias.name, runs["storage"], runs["uri"]) == alias
    assert alias.run in (runs["worse"], runs["better"]) and alias.source
    run, last = runs["worse"], sorted((Path(runs["storage"]) / runs["worse"] / "checkpoints").glob("epoch-*"))[-1].name
    assert resolve(run, runs["storage"], "") == resolve(f"{run}@{last}", runs["storage"], "") == (f"{run}@{last}", run, last, "")
    version = resolve(f"models:/{NAME}/1", runs["storage"], runs["uri"])
    assert version.run == run and version.checkpoint == last
    for codes in (run, f"{run}@{last}", version.name):
        check_encodes(version, codes, runs["storage"], runs["uri"])
    with pytest.raises(ValueError, match=f"codes of the index are of {run}@epoch-00000"):
        check_encodes(version, f"{run}@epoch-00000", runs["storage"], runs["uri"])
    with pytest.raises(ValueError, match="no run"):
        resolve("nothing", runs["storage"], "")
    with pytest.raises(ValueError, match="tracking server"):
        resolve("models:/nothing@champion", runs["storage"], runs["uri"])


def test_the_cache_keeps_the_last_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def download(name: str, uri: str, folder: Path) -> None:
        folder.mkdir()
        made.append(name)

    monkeypatch.setattr("pipelines.serving.encoders.download", download)
    monkeypatch.setattr("pipelines.serving.encoders.RegisteredEncoder", lambda folder, uri, gpu: Path(folder).name)
    monkeypatch.setattr("pipelines.serving.encoders.COPIES", 3)
    encoders, opened = Encoders("runs", "sqlite:///x", str(tmp_path)), {}
    for number in (0, 1, 2, 0, 3):  # 1 is then the one that was opened longest ago
        model = Resolved(f"models:/m/{number}", "", "", str(number))
        opened[number] = encoders._open(model)
        for each in (tmp_path / "encoders").iterdir():  # file systems may know whole seconds only
            os.utime(each, (each.stat().st_atime - 10, each.stat().st_mtime - 10))
    assert {each.name for each in (tmp_path / "encoders").iterdir()} == {opened[number] for number in (0, 2, 3)}
    assert made == [f"models:/m/{number}" for number in range(4)]
