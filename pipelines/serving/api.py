"""The service's routes: search, pictures, what there is, health, measurements, and the page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from pipelines.retrieval.queries import class_name
from pipelines.retrieval.sharded_index import Record
from pipelines.serving.gateway import Gateway, RequestError, Version, timed
from pipelines.serving.guard import Guard, Limits, Measures
from pipelines.serving.pictures import read_picture
from pipelines.serving.questions import Question, number, read_question
from pipelines.serving.shards import Found, Query

PAGE = Path(__file__).with_name("page")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
MOST_IDS = 200
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
FIELDS = {
    "id": TEXT | {"description": "an id of the index: search with its code"}, "code": TEXT | {"description": "a packed code in hexadecimal"},
    "k": COUNT | {"default": 10, "description": "answers to each query"}, "label": TEXT | {"description": "only answers of this class"},
    "domain": TEXT | {"description": "only answers of this domain"}, "index": TEXT | {"description": "name of the index (default: the first)"},
}  # fmt: skip
BODY = {"requestBody": {"required": True, "content": {
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "multipart/form-data": {"schema": {"type": "object", "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}} | FIELDS}},
    "application/json": {"schema": {"type": "object", "properties": FIELDS}},
}}}  # fmt: skip
SELECTION = {"parameters": [{"name": name, "in": "query", "schema": FIELDS[name]} for name in ("index", "label", "domain")]}


def create_app(gateway: Gateway, limits: Limits, token: str = "", values: tuple[float, float] | None = None) -> Any:
    """The ASGI application of a gateway.

    Args:
        token: SHA-256 of the token that requests need, in hexadecimal; "" for none.
        values: of the index's image files, as in ``decode``.
    """
    measures = Measures()

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        watcher = asyncio.create_task(gateway.watch())
        yield
        watcher.cancel()

    app = FastAPIOffline(title="hashbridge", description="Finds images across domains by binary codes.", redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": POLICY, "cache-control": "no-cache"})

    @app.post("/search", openapi_extra=BODY | SELECTION, summary="The nearest images of the index to images, to one of its own, or to a code")
    async def search(request: Request) -> Response:
        return JSONResponse(await gateway.within(_search(gateway, await gateway.within(read_question(request, limits)))))

    @app.get("/image/{name:path}", summary="The picture of an id of the index", openapi_extra={"parameters": SELECTION["parameters"][:1]})
    async def image(name: str, request: Request) -> Response:
        return await gateway.within(_picture(gateway.version(request.query_params.get("index", "")), name, values))

    @app.get("/ids", summary="Ids of the index, drawn at random", openapi_extra=SELECTION)
    async def ids(request: Request) -> Response:
        given = {name: request.query_params.get(name, "") for name in ("index", "label", "domain")}
        version = gateway.version(given["index"])
        count, seed = number(request, "count", 24, MOST_IDS), number(request, "seed", 1, 2**31)
        rows = await gateway.within(version.some(version.wanted(given["label"], given["domain"]), count, seed))
        return JSONResponse({"ids": [_shown(version, row) for row in rows]})

    @app.get("/about", summary="The indexes that are served: classes, domains, codes, version, model")
    async def about() -> Response:
        return JSONResponse({"indexes": [_about(name, gateway.version(name)) for name in gateway.sides], "limits": vars(limits)})

    @app.get("/healthz", summary="200 if requests are answered, 503 if not; with the reason why a later version is refused")
    async def healthz() -> Response:
        ready, state = gateway.health()
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/metrics", summary="Measurements of this gateway for Prometheus")
    async def metrics() -> Response:
        for name, state in gateway.health()[1]["indexes"].items():
            measures.codes.labels(name).set(state.get("codes", 0))
            measures.versions.labels(name).set(state.get("version", 0))
            measures.degraded.labels(name).set(bool(state["refused"] or state["registry"]))
        measures.retried.set(gateway.retried)
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return Guard(app, limits, token, measures)


async def _refused(_: Request, error: Any) -> Response:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 413:  # the rest of the body is not read
        headers["connection"] = "close"
    return JSONResponse({"error": error.reason}, error.status, headers)


async def _failed(_: Request, error: Any) -> Response:  # the guard logs it
    return JSONResponse({"error": "the request failed; the server's log says why"}, 500)


async def _not_found(_: Request, error: Any) -> Response:
    reasons = {404: "there is nothing here: /docs says what there is", 405: "this method is not for this path: /docs says which is"}
    return JSONResponse({"error": reasons.get(error.status_code, str(error.detail))}, error.status_code, error.headers)


def _about(name: str, version: Version) -> Record:
    manifest = version.served.manifest
    return {
        "index": name, "version": manifest["version"], "kind": manifest["kind"], "bits": manifest["bits"], "codes": version.served.count,
        "model": version.served.model.name, "classes": list(version.labels), "domains": version.domains, "images": len(version.shape) == 3,
    }  # fmt: skip


def _shown(version: Version, row: Record) -> Record:
    """What a client sees of a row; where its image lies is not part of it."""
    return {"id": row["id"], "label": row["label"], "class": class_name(row["label"], version.served.manifest["classes"]), "domain": row["domain"]}


async def _search(gateway: Gateway, question: Question) -> Record:
    version, times = gateway.version(question.index), dict[str, float]()
    with timed(times, "total"):
        wanted = version.wanted(question.label, question.domain)
        with timed(times, "encode"):
            names, codes = await _codes(version, question)
        with timed(times, "search"):
            found = await version.search([Query(code, question.k, wanted) for code in codes])
        answers = [_answers(version, each) for each in found]
    manifest = version.served.manifest
    return {
        "index": version.side.name, "version": manifest["version"], "model": version.served.model.name, "bits": manifest["bits"],
        "queries": [{"query": name, "answers": each} for name, each in zip(names, answers, strict=True)], "milliseconds": times,
    }  # fmt: skip


async def _codes(version: Version, question: Question) -> tuple[list[str], list[bytes]]:
    """Names and codes of the queries."""
    if question.images:
        if len(version.shape) != 3:
            raise RequestError(422, f"{version.served.model.name} takes feature vectors, not images: ask with an id or a code")
        return [f"image {place}" for place in range(1, len(question.images) + 1)], await version.encode(question.images)
    if question.id:
        return [question.id], [(await version.find(question.id))["code"]]
    size = version.served.manifest["bits"] // 8
    try:
        code = bytes.fromhex(question.code)
    except ValueError:
        code = b""
    if len(code) != size:
        raise RequestError(422, f"a code of this index is {2 * size} hexadecimal digits")
    return [question.code], [code]


def _answers(version: Version, found: Found) -> list[Record]:
    return [_shown(version, row) | {"distance": distance} for distance, row in zip(*found, strict=True)]


async def _picture(version: Version, name: str, values: tuple[float, float] | None) -> Response:
    row = await version.find(name)
    try:
        content, kind = await asyncio.to_thread(read_picture, row["origin"], values)
    except ValueError as error:
        raise RequestError(404, f"{row['id']}: {error}") from None
    return Response(content, media_type=kind, headers={"cache-control": "private, max-age=60"})
