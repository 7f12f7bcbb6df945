"""Reads what a request to search asks for, from any of the three forms of its body, and refuses what does not fit."""

import json
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from pipelines.serving.gateway import RequestError
from pipelines.serving.guard import Limits

NAMES = ("id", "code", "k", "label", "domain", "index")
SMALL = 2**16  # bytes of a body that holds no image
FORMS = "send an image as the body, images as multipart/form-data, or JSON with an id or a code"


@dataclass
class Question:
    """What is asked for: images, or an id, or a packed code in hexadecimal; so many answers; of a class and a domain ("" for any); of an index."""

    images: list[bytes]
    id: str = ""
    code: str = ""
    k: int = 10
    label: str = ""
    domain: str = ""
    index: str = ""


async def read_question(request: Request, limits: Limits) -> Question:
    """Read a request to search.

    Raises:
        RequestError: it does not fit; says why in one line.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    given: dict[str, Any] = {name: request.query_params[name] for name in NAMES if name in request.query_params}
    images: list[bytes] = []
    if kind == "application/json":
        given |= _json(await read_body(request, min(SMALL, limits.body)))
    elif kind == "multipart/form-data":
        fields, images = await _form(request, await read_body(request, limits.body), limits)
        given |= fields
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images = [await read_body(request, limits.body)]
    else:
        raise RequestError(415, FORMS)
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise RequestError(422, f"there is no field {unknown[0][:100]!r}: there are {', '.join(NAMES)} and image")
    k = _whole("k", given.pop("k", 10), limits.answers)
    wrong = [name for name, value in given.items() if not isinstance(value, str)]
    if wrong:
        raise RequestError(422, f"{wrong[0]} must be text")
    question = Question(images, k=k, **given)
    if bool(images) + bool(question.id) + bool(question.code) != 1:
        raise RequestError(422, "give images, an id or a code, one of them")
    return question


def _whole(name: str, value: Any, most: int) -> int:
    """A whole number from 1 to ``most``."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise RequestError(422, f"{name} must be a whole number from 1 to {most}")
    return value


def number(request: Request, name: str, default: int, most: int) -> int:
    """A whole number from 1 to ``most`` of a request's address."""
    return _whole(name, request.query_params.get(name, default), most)


async def read_body(request: Request, most: int) -> bytes:
    """A request's body of at most so many bytes.

    Raises:
        RequestError: it is larger, empty, or the client went away.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise RequestError(413, f"the body is larger than {most:,} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise RequestError(400, "the body ended early") from None
    if not size:
        raise RequestError(422, f"the body is empty: {FORMS}")
    return b"".join(parts)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(422, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise RequestError(422, "the body must be a JSON object, such as {\"id\": \"...\", \"k\": 10}")
    return value


async def _form(request: Request, body: bytes, limits: Limits) -> tuple[dict[str, str], list[bytes]]:
    """The fields and the images of a form."""

    async def once() -> Any:
        yield body

    try:
        form = await MultiPartParser(request.headers, once(), max_files=limits.images, max_fields=len(NAMES), max_part_size=SMALL).parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError, LookupError) as error:
        raise RequestError(422, f"the form cannot be read: {(str(error).splitlines() or [''])[0][:100]}") from None
    fields, images = dict[str, str](), []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise RequestError(422, f"a file is in field {name[:100]!r}: send it as image")
            images.append(await value.read())
        else:
            fields[name] = value
    await form.close()
    return fields, images
