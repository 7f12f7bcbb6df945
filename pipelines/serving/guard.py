"""Stands before the routes: token, host, number of requests at once, measurements, and no traceback for a client."""

import hashlib
import hmac
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Message, Receive, Scope, Send

from pipelines.serving.environment import is_loopback

logger = logging.getLogger("ray.serve")
OPEN = ("/", "/healthz", "/docs", "/docs/oauth2-redirect", "/openapi.json")  # paths without data of the index, and those below the next
OPEN_BELOW = ("/page/", "/static-offline-docs/")


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        body: bytes of it.
        images: number of queries.
        answers: to each.
        waiting: requests that are worked on at once; more are answered with 503.
    """

    body: int = 32 * 2**20
    images: int = 32
    answers: int = 1000
    waiting: int = 128


class Measures:
    """What ``/metrics`` shows of this gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("hashbridge_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "hashbridge_request_seconds", "Seconds of requests by path", ["path"], registry=self.registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
        )  # fmt: skip
        self.waiting = Gauge("hashbridge_requests_at_work", "Requests that are worked on", registry=self.registry)
        self.codes = Gauge("hashbridge_index_codes", "Codes of an index", ["index"], registry=self.registry)
        self.versions = Gauge("hashbridge_index_version", "Version of an index", ["index"], registry=self.registry)
        self.degraded = Gauge("hashbridge_index_refused", "1 if the latest version of an index or model is not served", ["index"], registry=self.registry)
        self.retried = Gauge("hashbridge_retries", "Questions to shards and encoders that were asked again", registry=self.registry)


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, limits: Limits, token: str, measures: Measures) -> None:
        """Args:
        token: SHA-256 of the token that requests need, in hexadecimal; "" for none, then only requests to this machine's own names are answered.
        """
        self.app, self.limits, self.token, self.measures, self.now = app, limits, token, measures, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in one line of JSON."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, path, told = time.perf_counter(), scope["path"], [0]

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                told[0] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            await send(message)

        refusal = self._refusal(scope)
        self.now += 1
        self.measures.waiting.set(self.now)
        try:
            if refusal:
                await refuse(tell, *refusal)
            else:
                await self.app(scope, receive, tell)
        except Exception:
            logger.exception("a request to %s failed", path[:200])
            if not told[0]:
                await refuse(tell, 500, "the request failed; the server's log says why")
        finally:
            self.now -= 1
            self.measures.waiting.set(self.now)
            route = getattr(scope.get("route"), "path", "") or ("/page" if path.startswith(OPEN_BELOW) else "other")
            self.measures.requests.labels(route, str(told[0] or "closed")).inc()
            self.measures.seconds.labels(route).observe(time.perf_counter() - begun)

    def _refusal(self, scope: Scope) -> tuple[int, str, int] | None:
        """Status, reason and seconds after which to try again, of a request that does not reach its route."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        if not self.token:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if not is_loopback(name.strip("[]")):  # a page elsewhere may have made its name point here
                return 403, "without a token only this machine's own names are answered", 0
        elif path not in OPEN and not path.startswith(OPEN_BELOW):
            given = headers.get(b"authorization", b"")
            sent = given[7:] if given[:7].lower() == b"bearer " else b""
            if not hmac.compare_digest(hashlib.sha256(sent).hexdigest(), self.token):
                return 401, "a token is needed: Authorization: Bearer TOKEN", 0
        if self.now >= self.limits.waiting and path != "/healthz":
            return 503, f"{self.limits.waiting} requests are worked on already: try again", 1
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body:
            return 413, f"the body is larger than {self.limits.body:,} bytes", 0
        return None


async def refuse(send: Send, status: int, reason: str, retry_after: int = 0) -> None:
    """Answer with one line of JSON, and close the connection, on which the rest of a body may still come."""
    content = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), (b"connection", b"close")]
    headers += [(b"retry-after", str(retry_after).encode())] if retry_after else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
