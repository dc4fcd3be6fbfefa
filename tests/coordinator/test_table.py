"""The table of a run: what it shows of snapshots that follow each other."""

from __future__ import annotations

import io

from rich.console import Console

from scpl_dist.control.messages import Stats
from scpl_dist.coordinator.status import Status, snapshot
from scpl_dist.coordinator.table import StatusTable
from scpl_dist.run.phases import Phase
from tests.support.coordinator import Run, at_step


def drawn(table: StatusTable, status: Status) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(table.draw(status))
    return capture.get().splitlines()


def look(table: StatusTable, run: Run) -> list[str]:
    return drawn(table, snapshot(run.coordinator, run.now))


def test_it_has_step_loss_shares_and_what_the_run_has_reached() -> None:
    run = Run().start().play(until=at_step(4))
    table = StatusTable()
    run.beat(1, Phase.FORWARD, step=5, epoch=1, stats=Stats(busy=1.0, queue=1, bytes_sent=1_000_000))
    run.beat(2, Phase.FORWARD, step=5, epoch=1)
    look(table, run)
    run.now += 2
    run.beat(
        1, Phase.RECEIVE, step=5, epoch=1, stats=Stats(busy=1.5, waiting=1.5, queue=2, bytes_sent=6_000_000)
    )
    lines = look(table, run)
    assert lines[0].split() == (
        ["stage", "step", "loss", "busy", "waiting", "blocked", "queue", "MB/s", "sent", "phase", "host"]
    )
    assert lines[2].split() == ["1", "5", "2.0000", "25%", "75%", "0%", "2", "2.50", "receive", "host1"]
    assert lines[4] == (
        "scpl, epoch 2/3, step 5/9, validation accuracy 0.5000, test accuracy 0.5000, 18 samples/s, 0:00:03 left, "
        "0 checkpoints"
    )


def shares_of_stage_1(lines: list[str]) -> list[str]:
    return [cell for cell in lines[2].split() if cell.endswith("%")]


def test_shares_are_those_of_the_last_seconds_and_at_first_those_since_the_start() -> None:
    run, table = Run().start(), StatusTable()
    run.beat(1, stats=Stats())
    assert shares_of_stage_1(look(table, run)) == []
    table = StatusTable()
    run.beat(1, stats=Stats(busy=10.0))
    assert shares_of_stage_1(look(table, run)) == ["100%", "0%", "0%"]
    for second in range(1, 11):
        run.now += 1
        run.beat(1, stats=Stats(busy=10.0, waiting=0.75 * second, blocked=0.25 * second))
        lines = look(table, run)
    assert shares_of_stage_1(lines) == ["0%", "75%", "25%"], "what was 10 s ago does not count"


def test_a_run_that_was_started_again_counts_anew() -> None:
    table = StatusTable()
    for busy, waiting in ((100.0, 0.0), (1.0, 3.0)):
        run = Run().start()
        run.beat(1, stats=Stats(busy=busy, waiting=waiting))
        lines = drawn(table, snapshot(run.coordinator, run.now) | {"generation": f"with {busy}"})
    assert shares_of_stage_1(lines) == ["25%", "75%", "0%"]


def test_it_says_who_is_missing() -> None:
    run = Run()
    run.hello(1)
    lines = look(StatusTable(), run)
    assert [line.strip().endswith("not here yet") for line in lines[1:4]] == [True, False, True]
    assert lines[4] == "1 of 3 workers have joined; the run is gathering"


def test_one_host_is_not_named_and_brackets_are_text() -> None:
    run = Run().start()
    status = snapshot(run.coordinator, run.now)
    for worker in status["workers"]:
        worker["host"] = "[bold]"
    assert "host" not in drawn(StatusTable(), status)[0]
    status["workers"][0]["host"] = "other"
    assert drawn(StatusTable(), status)[2].endswith("[bold]")
