"""What the coordinator tells over HTTP: ``/metrics``, ``/status``, ``/healthz``, ``/readyz``, and a page at ``/``.

A thread for each request, so a client that sends nothing or reads nothing holds up nobody; after a while it is cut
off. A thread and a descriptor are all that it costs, and there are at most `CONNECTIONS` of them: who comes when all
are taken is turned away at once, so that no crowd can take the descriptors that the run needs.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from scpl_dist.coordinator import page
from scpl_dist.coordinator.metrics import RunCollector
from scpl_dist.coordinator.status import Status
from scpl_dist.run.config import USUAL_PORT, Metrics

CONNECTIONS = 64


class HttpServer(ThreadingMixIn, TCPServer):
    """Serves snapshots, which `status` takes, for several threads at once; ValueError if it cannot listen there."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 2 * CONNECTIONS  # a queue that is too short makes clients wait for seconds

    def __init__(self, status: Callable[[], Status], host: str, port: int) -> None:
        self.status = status
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(RunCollector(status))
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"metrics.host = {host!r}, metrics.port = {port}: cannot listen there ({error.strerror}); choose "
                "another one, or -o metrics.port=0 for any free port"
            ) from None
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/metrics"
        threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def listening(status: Callable[[], Status], metrics: Metrics) -> HttpServer:
    """A server on the port that the user has named; else on the usual one, or on any if another run has that."""
    if metrics.port != "auto":
        return HttpServer(status, metrics.host, metrics.port)
    try:
        return HttpServer(status, metrics.host, USUAL_PORT)
    except ValueError:
        found = HttpServer(status, metrics.host, 0)
    print(f"port {USUAL_PORT} is taken: the metrics are at {found.url}", file=sys.stderr, flush=True)
    return found


class _Handler(MetricsHandler):
    server: HttpServer
    timeout = 10.0  # seconds

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self.registry = self.server.registry
                super().do_GET()
            case "/status":
                self._answer(200, "application/json", json.dumps(self.server.status(), allow_nan=False))
            case "/healthz":
                self._answer(200, "text/plain", "ok\n")
            case "/readyz":
                reason = self.server.status()["unready"]
                self._answer(503 if reason else 200, "text/plain", f"{reason or 'ok'}\n")
            case path if path in page.LIVE:
                name, kind = page.LIVE[path]
                self._answer(200, kind, page.asset(name))
            case _:
                self._answer(404, "text/plain", "try /, /metrics, /status, /healthz or /readyz\n")

    def _answer(self, code: int, kind: str, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Security-Policy", page.POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())
