"""Watching a run from elsewhere."""

from __future__ import annotations

import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scpl_dist.commands.top import url_of
from tests.support.command import called, scpl_dist
from tests.support.conduct import Running
from tests.support.programs import Program


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("127.0.0.1:9400", "http://127.0.0.1:9400/status"),
        ("http://host:1/", "http://host:1/status"),
        ("https://host/metrics", "https://host/status"),
        ("http://[::1]:1/status", "http://[::1]:1/status"),
    ],
)
def test_an_address_may_be_short(target: str, url: str) -> None:
    assert url_of(target) == url


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    assert "no run is in progress there" in called("top", tmp_path, code=2).stderr
    assert "nobody answers at http://127.0.0.1:1/status" in called("top", "127.0.0.1:1", code=1).stdout


def test_somebody_else_who_answers_is_no_run() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[1]")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request).start()
        done = called("top", f"127.0.0.1:{server.server_port}", code=1)
    assert "the answer is not that of a coordinator" in done.stdout


def test_a_run_is_watched_from_its_folder_until_it_ends(tmp_path: Path) -> None:
    with Running(tmp_path / "run", "run.epochs=100000") as running:
        running.wait_for_rows("train")
        address = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
        assert scpl_dist("top", address, "--once").stdout.startswith("stage")
        table = scpl_dist("top", tmp_path / "run", "--once").stdout.splitlines()
        assert [line.split()[0] for line in table[1:3]] == ["0", "1"]
        assert table[3].startswith("scpl, epoch ")
        command = (sys.executable, "-m", "scpl_dist", "top", tmp_path / "run", "--every", 0.1)
        with Program(*command) as follower:
            follower.wait_for("\n")
            assert follower.output.startswith("stage")
            running.signal(signal.SIGTERM)
            assert follower.wait(60) == 0
            assert follower.output.splitlines()[-1].startswith("the run has ended: stopped by SIGTERM")
        assert running.end().code == 143
    assert "the run has ended: stopped by SIGTERM" in called("top", tmp_path / "run", "--once").stdout
