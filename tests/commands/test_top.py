"""Watching a run from its metrics."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from scpl_dist.commands.top import Sample, picture, url_of
from scpl_dist.commands.top import scrape as scrape_of
from scpl_dist.control.messages import Stats
from tests.coordinator.test_machine import Run
from tests.coordinator.test_metrics import Scrape
from tests.support.command import called, scpl_dist
from tests.support.conduct import Running
from tests.support.programs import Program


def drawn(new: Sample, old: Sample | None) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120)
    console.print(picture(new, old))
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def look(source: Scrape, now: float) -> Sample:
    found = scrape_of(source.exporter.url)
    found.now = now
    return found


def test_shares_and_rates_are_those_between_two_looks() -> None:
    run = Run().start().play(until=lambda item: item.get("step") == 4)
    scrape = Scrape(run)
    run.beat(1, step=4, stats=Stats(busy=10.0, waiting=10.0, bytes_sent=1_000_000))
    old = look(scrape, 100.0)
    run.beat(1, step=4, stats=Stats(busy=13.0, waiting=10.5, blocked=0.5, queue=2, bytes_sent=5_000_000))
    new = look(scrape, 104.0)
    scrape.exporter.close()
    heading, *stages, status = drawn(new, old)
    assert heading == [
        "stage",
        "workers",
        "step",
        "loss",
        "busy",
        "waiting",
        "blocked",
        "queue",
        "MB/s",
        "sent",
        "host",
    ]
    assert stages[1] == ["1", "1", "4", "2.0000", "75%", "12%", "12%", "2", "1.00", "host1"]
    assert " ".join(status).startswith("scpl, epoch 2, test accuracy 0.5000, validation accuracy 0.5000, ")


def test_a_stage_that_has_not_come_is_shown() -> None:
    run = Run()
    scrape = Scrape(run)
    rows = drawn(look(scrape, 0.0), None)
    scrape.exporter.close()
    assert rows[1][-3:] == ["not", "here", "yet"]


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("127.0.0.1:9400", "http://127.0.0.1:9400/metrics"),
        ("http://host:1/", "http://host:1/metrics"),
        ("https://host/metrics", "https://host/metrics"),
    ],
)
def test_an_address_may_be_short(target: str, url: str) -> None:
    assert url_of(target) == url


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    assert "no run is in progress there" in called("top", tmp_path, code=2).stderr
    assert "nobody answers at http://127.0.0.1:1/metrics" in called("top", "127.0.0.1:1", code=1).stdout


def test_a_run_is_watched_from_its_folder_until_it_ends(tmp_path: Path) -> None:
    with Running(tmp_path / "run", "run.epochs=100000") as running:
        running.wait_for_rows("train")
        table = scpl_dist("top", tmp_path / "run", "--once").stdout.splitlines()
        assert [line.split()[0] for line in table[1:3]] == ["0", "1"]
        assert table[3].startswith("scpl, epoch ")
        command = (sys.executable, "-m", "scpl_dist", "top", tmp_path / "run", "--every", 0.1)
        with Program(*command) as follower:
            follower.wait_for("\n")
            assert follower.output.startswith("stage")
            running.signal(signal.SIGTERM)
            assert follower.wait(60) == 0
            assert follower.output.splitlines()[-1].startswith("the run does not answer any more")
        assert running.end().code == 143
