"""An S3-speaking server on loopback, which can be told to refuse."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from werkzeug.serving import make_server

BUCKET = "hashbridge-tests"
BUSY = (503, "SlowDown", "Please reduce your request rate.")
FORBIDDEN = (403, "AccessDenied", "Access Denied")


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
        self.refused = 0
        self.server = make_server("127.0.0.1", port, self._answer, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        refusal = self.refuse(environment["REQUEST_METHOD"], environment["PATH_INFO"])
        if refusal is None:
            return self.inner(environment, start)
        self.refused += 1
        status, code, message = refusal
        start(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]

    def stop(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.thread.join()
