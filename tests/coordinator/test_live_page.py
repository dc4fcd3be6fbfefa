"""The live page in a real browser, beside a coordinator that a test plays."""

from __future__ import annotations

import threading
from pathlib import Path

from scpl_dist.coordinator.http_server import HttpServer
from scpl_dist.coordinator.status import Status, snapshot
from tests.support.browser import shown
from tests.support.coordinator import Run, at_step


def test_the_page_shows_the_status_as_it_changes(tmp_path: Path) -> None:
    run = Run().start().play(until=at_step(4))
    lock = threading.Lock()
    seen: list[str] = []

    def status() -> Status:
        """Each look sees the run a little later."""
        with lock:
            run.now += 0.5
            for stage in run.stages if run.next_item is not None else ():
                run.busy[stage] += 0.25
                run.done(stage)
            found = snapshot(run.coordinator, run.now)
            seen.append(f"{found['step']} of {found['steps']}")
            return found

    server = HttpServer(status, "127.0.0.1", 0)
    try:
        found = shown(server.url.removesuffix("metrics"), tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert found.console == []
    assert found.figures()["step"] in seen[-2:]  # an answer may come when the page is taken down
    assert found.figures()["accuracy"] == "50.00 %"
    assert found.headings()[:2] == ["Stages", "Time of the stages"]
    assert "host1" in found.text
