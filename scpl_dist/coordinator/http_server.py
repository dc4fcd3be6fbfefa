"""What the coordinator tells over HTTP: ``/metrics``, ``/status``, ``/healthz`` and ``/readyz``.

A thread for each request, so a client that sends nothing or reads nothing holds up nobody; after a while it is cut
off. A thread and a descriptor are all that it costs, and there are at most `CONNECTIONS` of them: who comes when all
are taken is turned away at once, so that no crowd can take the descriptors that the run needs.
"""

from __future__ import annotations

import io
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from scpl_dist.coordinator.metrics import RunCollector
from scpl_dist.coordinator.status import Status

CONNECTIONS = 64
TIMEOUT_S = 10.0
TEXT = "text/plain; charset=utf-8"


class HttpServer:
    """Serves snapshots of a run in threads of its own; `status` takes one and may be called by several at once.

    Port 0 takes any free one.

    Raises:
        ValueError: the address cannot be bound; the message has the keys and the fix.
    """

    def __init__(self, status: Callable[[], Status], host: str, port: int) -> None:
        self._status = status
        registry = CollectorRegistry()
        registry.register(RunCollector(status))
        self._metrics = make_wsgi_app(registry)
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"metrics.host = {host!r}, metrics.port = {port}: cannot listen there ({error.strerror}); choose "
                "another one, or -o metrics.port=0 for any free port"
            ) from None
        self._server.set_app(self._answer)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="http", daemon=True
        )
        self._thread.start()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        code, kind, body = "200 OK", TEXT, "ok\n"
        match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
            case "GET", "/metrics":
                answer: Iterable[bytes] = self._metrics(environ, start_response)
                return answer
            case "GET", "/status":
                kind, body = "application/json", json.dumps(self._status(), allow_nan=False)
            case "GET", "/healthz":
                pass
            case "GET", "/readyz":
                reason = self._status()["unready"]
                if reason is not None:
                    code, body = "503 Service Unavailable", f"{reason}\n"
            case "GET", _:
                code, body = "404 Not Found", "try /metrics, /status, /healthz or /readyz\n"
            case _:
                code, body = "501 Not Implemented", "only GET is served\n"
        content = body.encode()
        start_response(code, [("Content-Type", kind), ("Content-Length", str(len(content)))])
        return [content]

    def close(self) -> None:
        """Stop serving; a request that is being answered is not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""

    def get_stderr(self) -> io.StringIO:
        """A client that reads nothing is no news either."""
        return io.StringIO()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 2 * CONNECTIONS  # a queue that is too short makes clients wait for seconds

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking the name service for this host's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own if there is one left."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, in the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
