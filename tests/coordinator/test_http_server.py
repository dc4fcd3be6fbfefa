"""What the coordinator serves over HTTP, and that no client can hurt it."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scpl_dist.coordinator import http_server
from scpl_dist.coordinator.events import Signal
from scpl_dist.coordinator.http_server import CONNECTIONS, HttpServer, listening
from scpl_dist.coordinator.status import Status, snapshot
from scpl_dist.run.config import Metrics
from tests.support.coordinator import Run
from tests.support.programs import until_nothing

LIMIT_S = 20.0


class Served:
    """A run, served as the coordinator does."""

    def __init__(self, run: Run, change: Callable[[Status], Status] = lambda status: status) -> None:
        self.run = run
        self.lock = threading.Lock()
        self.change = change
        self.server = HttpServer(self.status, "127.0.0.1", 0)
        self.base = self.server.url.removesuffix("/metrics")
        self.address = ("127.0.0.1", int(self.base.rpartition(":")[2]))

    def status(self) -> Status:
        with self.lock:
            return self.change(snapshot(self.run.coordinator, self.run.now))

    def get(self, path: str, limit_s: float = LIMIT_S) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.base + path, timeout=limit_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=LIMIT_S)


def close(server: HttpServer) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served(Run().start().play().leave())
    yield found
    close(found.server)


def test_a_taken_port_is_an_error_only_if_it_was_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = served.address[1]
    with pytest.raises(ValueError, match=f"metrics.port = {taken}: cannot listen"):
        listening(served.status, Metrics(port=taken))
    monkeypatch.setattr(http_server, "USUAL_PORT", taken)
    other = listening(served.status, Metrics())
    assert capsys.readouterr().err == f"port {taken} is taken: the metrics are at {other.url}\n"
    assert other.server_address[1] != taken
    close(other)


def test_metrics_are_those_of_prometheus(served: Served) -> None:
    code, text = served.get("/metrics")
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert code == 200
    assert {"scpl_step", "scpl_samples_total"} <= names


def test_a_prometheus_may_ask_for_less_bytes(served: Served) -> None:
    request = urllib.request.Request(served.base + "/metrics", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        assert gzip.decompress(answer.read()).startswith(b"# HELP scpl_run_info")


def test_the_status_is_the_snapshot_as_json(served: Served) -> None:
    code, text = served.get("/status")
    assert code == 200
    assert json.loads(text) == served.status()


def test_health_is_about_the_process_and_readiness_about_progress() -> None:
    run = Run()
    run.hello(0)
    served = Served(run)
    assert served.get("/healthz") == (200, "ok\n")
    assert served.get("/readyz") == (503, "1 of 3 workers have joined; the run is gathering\n")
    for stage in (1, 2):
        run.hello(stage)
    run.start()
    assert served.get("/readyz") == (200, "ok\n")
    run.now += 11
    assert served.get("/readyz") == (503, "no stage has made progress for 11 s\n")
    run.event(Signal("launcher", 2))
    run.event(Signal("launcher", 2))
    assert served.get("/readyz")[0] == 503
    assert served.get("/healthz") == (200, "ok\n")
    close(served.server)


@pytest.mark.parametrize(
    "path", ["/metricsx", "/favicon.ico", "/../metrics", "/page", "/report.js", "/../page.css"]
)
def test_other_paths_do_not_exist(served: Served, path: str) -> None:
    assert served.get(path)[0] == 404


def test_the_page_has_everything_from_here_and_may_reach_nothing_else(served: Served) -> None:
    for path, kind in (
        ("/", "html"),
        ("/page.css", "css"),
        ("/charts.js", "javascript"),
        ("/live.js", "javascript"),
    ):
        with urllib.request.urlopen(served.base + path, timeout=LIMIT_S) as answer:
            assert answer.headers["Content-Type"] == f"text/{kind}; charset=utf-8"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            text = answer.read().decode()
        assert not re.search(r"(src|href)=.https?:|@import|eval\(|innerHTML|document\.write", text)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', served.get("/")[1])) == {
        "page.css",
        "charts.js",
        "live.js",
        "data:,",
    }


@pytest.mark.parametrize("path", ["/", "/metrics", "/status"])
def test_only_get_is_served(served: Served, path: str) -> None:
    connection = http.client.HTTPConnection(*served.address, timeout=LIMIT_S)
    connection.request("POST", path, body=b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_client_that_says_nothing_holds_up_nobody(served: Served) -> None:
    with served.connect() as silent:
        assert served.get("/healthz")[0] == 200
        silent.sendall(b"GET /met")
        assert served.get("/metrics")[0] == 200


def test_a_client_that_reads_nothing_holds_up_nobody_and_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scpl_dist.coordinator.http_server._Handler.timeout", 5.0)
    served = Served(Run(), lambda status: status | {"version": "x" * 50_000_000})
    with served.connect() as deaf:
        deaf.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        assert deaf.recv(10) == b"HTTP/1.0 2"  # the answer has begun, and is far longer than all buffers
        assert served.get("/healthz")[0] == 200
        close(served.server)
        until_nothing(lambda: ", ".join(t.name for t in threading.enumerate() if "request" in t.name))
        received = 0
        while chunk := deaf.recv(1 << 20):
            received += len(chunk)
    assert received < 50_000_000
    assert capfd.readouterr().err == ""


def test_a_crowd_takes_no_more_than_its_share_of_the_descriptors(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(served.connect()) for _ in range(CONNECTIONS)]
        for one in crowd:
            one.sendall(b"GET /healthz HTTP/1.0\r\n")  # the end of the request is held back
        late = stack.enter_context(served.connect())
        assert closed(late), "turned away at once"
        crowd[0].sendall(b"\r\n")
        assert crowd[0].recv(12) == b"HTTP/1.0 200"
        while crowd[0].recv(1 << 16):
            pass
        assert until_answered(served)[0] == 200


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def until_answered(served: Served) -> tuple[int, str]:
    """The thread that has answered needs a moment to end."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return served.get("/healthz")
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline


def test_a_request_sees_the_state_between_two_events(served: Served) -> None:
    with served.lock:
        thread = threading.Thread(target=served.get, args=("/metrics",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "while an event is handled a request waits"
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_taken_port_is_named_with_the_fix(served: Served) -> None:
    with pytest.raises(ValueError, match=rf"metrics\.port = {served.address[1]}.*metrics\.port=0"):
        HttpServer(served.status, *served.address)


def test_the_name_service_is_not_asked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("it may take seconds to answer")

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname", "getnameinfo"):
        monkeypatch.setattr(socket, name, asked)
    server = HttpServer(served.status, "127.0.0.1", 0)
    with urllib.request.urlopen(server.url, timeout=LIMIT_S) as answer:
        assert answer.status == 200
    close(server)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this host has no IPv6")
def test_an_ipv6_address_works(served: Served) -> None:
    server = HttpServer(served.status, "::1", 0)
    assert server.url.startswith("http://[::1]:")
    with urllib.request.urlopen(server.url, timeout=LIMIT_S) as answer:
        assert answer.status == 200
    close(server)
