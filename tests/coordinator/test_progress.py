"""What the user sees, with the text of a terminal and without one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from scpl_dist.coordinator.events import Say
from scpl_dist.coordinator.progress import Progress, failure_text, summary
from scpl_dist.run.failures import Cause, Failure, Outcome
from tests.support.coordinator import Run, at_step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TERM"])
def test_lines_instead_of_a_table_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "xterm-color" if variable == "TERM" else "1")  # as notebooks and CI have it
    stream = io.StringIO()
    run = Run()
    progress = Progress(run.coordinator, stream)
    progress.say(Say("epoch 1/3: [markup] is text"))
    progress.say(Say("slow", "warning"))
    progress.update(0.0)
    progress.close()
    assert stream.getvalue() == "epoch 1/3: [markup] is text\nwarning: slow\n"


def test_where_nobody_watches_a_line_comes_after_seconds_of_silence() -> None:
    stream = io.StringIO()
    run = Run().start().play(until=at_step(4))
    progress = Progress(run.coordinator, stream)

    def lines(after_s: float) -> list[str]:
        stream.seek(0)
        stream.truncate()
        run.now += after_s
        progress.update(run.now)
        return stream.getvalue().splitlines()

    assert [lines(0.0), lines(9.0)] == [[], []]
    [said] = lines(2.0)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d scpl, epoch 2/3, step \d/9, .* left, 0 checkpoints, loss \d+\.\d{4}", said
    )
    assert lines(2.0) == []
    progress.say(Say("something"))
    assert [lines(9.0), lines(9.0)] == [[], []], "what was said broke the silence"
    assert len(lines(2.0)) == 1


def test_of_epochs_that_follow_fast_the_newest_is_told_each_second_with_the_time_left() -> None:
    stream = io.StringIO()
    run = Run().start().play(until=at_step(4))
    progress = Progress(run.coordinator, stream)
    for epoch in range(1, 26):
        progress.say(Say(f"epoch {epoch}/25: test accuracy 0.5", "epoch"))
        progress.update(run.now)
        run.now += 0.1
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "epoch 1/25",
        "epoch 11/25",
        "epoch 21/25",
        "epoch 25/25",
    ]
    assert all(
        re.fullmatch(r"epoch \d+/25: test accuracy 0\.5, \d:\d\d:\d\d left", line) for line in lines[:-1]
    )


def test_a_terminal_shows_a_row_for_each_stage_and_warnings_above() -> None:
    stream = Terminal()
    run = Run().start().play(until=at_step(4))
    progress = Progress(run.coordinator, stream)
    progress.say(Say("epoch 1/3", "epoch"))
    progress.say(Say("stage 1 is slow", "warning"))
    progress.update(run.now)
    progress.close()
    text = stream.getvalue()
    assert "epoch 1/3\n" not in text, "the table has it"
    assert "warning: stage 1 is slow" in text
    assert "\x1b[" in text


def test_a_terminal_without_colours_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    run = Run().start().play(until=at_step(4))
    progress = Progress(run.coordinator, stream)
    progress.update(run.now)
    progress.close()
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", stream.getvalue()) for code in found.split(";")}
    assert codes <= {"", "0", "1"}, "bold is no colour"


def test_a_failure_is_one_block_with_the_cause_last(tmp_path: Path) -> None:
    failure = Failure(
        cause=Cause.RAISED,
        message="ValueError: \x1b[31mno\x1b[0m",
        advice="mend the model",
        stage=1,
        host="here",
        rank=1,
        pid=42,
        phase="loss",
        step=7,
        micro_batch=0,
        traceback="Traceback\n  line 3",
    )
    assert failure_text(failure, tmp_path, "stage1").splitlines() == [
        "",
        "The run failed.",
        "",
        "Traceback",
        "  line 3",
        "",
        "  where:      stage 1, host here, rank 1, pid 42, phase loss, step 7, micro-batch 0",
        f"  log:        {tmp_path}",
        "  what to do: mend the model",
        "  cause:      ValueError: ?[31mno?[0m",
    ]


def test_a_killed_stage_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "stage2.log").write_text("\n".join(f"line {number}" for number in range(1000)))
    text = failure_text(Failure(Cause.DIED, "killed", "look", stage=2), tmp_path, "stage2")
    assert "line 999\n" in text
    assert "line 985\n" in text
    assert "line 984\n" not in text
    assert f"log:        {tmp_path / 'stage2.log'}" in text
    assert text.endswith("cause:      killed")


@pytest.mark.parametrize("splits", [{"validation": 30, "test": 20}, {"test": 20}, {}])
def test_the_summary_fits_the_data(splits: dict[str, int]) -> None:
    run = Run(sizes={"train": 50, **splits}).start().play().leave()
    text = summary(run.end, Path("runs/x"))
    assert "scpl, 3 stages: 9 steps in" in text
    accuracies = "test accuracy 0.5000 after the last epoch, 0.5000 after epoch 1, the best by "
    assert (accuracies in text) == ("test" in splits)
    assert text.endswith("run folder runs/x; everything about it: scpl-dist report runs/x")


def test_a_stopped_run_says_how_to_go_on() -> None:
    text = summary(Outcome(143, "stopped by SIGTERM"), Path("runs/x"))
    assert text.startswith(
        "stopped by SIGTERM; go on with: scpl-dist train --resume auto --run-dir runs/x, or "
    )
