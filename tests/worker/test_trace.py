from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scpl_dist.control.items import EpochEnd, Train
from scpl_dist.run.phases import Phase
from scpl_dist.storage.spans import recordings
from scpl_dist.worker import trace as module
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.trace import Trace

WHOSE: dict[str, Any] = {"rank": 0, "stage": 0, "replica": 0, "host": "a", "generation": "g"}


def step(number: int) -> Train:
    return Train(sequence=number, step=number, epoch=0, schedule={}, micro_batches=((0, 2),))


def play(trace: Trace, steps: range) -> None:
    """What a stage does in each step: it takes a message, computes and sends one."""
    timer = PhaseTimer()
    timer.trace = trace
    for number in steps:
        timer.enter(Phase.RECEIVE)
        trace.passed(False, 1)
        timer.begin(step(number))
        timer.block = 3
        timer.enter(Phase.FORWARD)
        timer.block = -1
        timer.enter(Phase.SEND)
        trace.passed(True, 2)
    timer.enter(Phase.RECEIVE)
    timer.begin(EpochEnd(sequence=len(steps), epoch=0))
    trace.close(60)


def test_spans_follow_each_other_and_belong_to_the_item_that_was_waited_for(tmp_path: Path) -> None:
    play(Trace(tmp_path, "stage0", 1, WHOSE), range(3))
    (found,) = recordings(tmp_path)
    assert [(span.phase, span.sequence, span.block) for span in found.spans] == [
        (phase, number, block)
        for number in range(3)
        for phase, block in (("receive", -1), ("forward", 3), ("send", -1))
    ]
    assert all(a.end == b.begin for a, b in zip(found.spans, found.spans[1:], strict=False))
    assert [(message.sent, message.rank, message.number) for message in found.messages] == [
        (sent, 1 + sent, number) for number in range(3) for sent in (False, True)
    ]


def test_of_many_steps_a_stretch_is_recorded_and_messages_keep_their_numbers(tmp_path: Path) -> None:
    play(Trace(tmp_path, "stage0", 20, WHOSE), range(45))
    (found,) = recordings(tmp_path)
    steps = [*range(8), *range(20, 28), *range(40, 45)]
    assert sorted({span.step for span in found.spans}) == steps
    assert [message.number for message in found.messages if message.sent] == steps
    assert {message.number for message in found.messages if not message.sent} >= set(steps)


@pytest.mark.parametrize("full", [False, True])
def test_what_cannot_be_written_is_one_warning_and_training_goes_on(
    full: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.0)
    trace = Trace(tmp_path, "stage0", 1, WHOSE)
    if full:
        trace._file.close()
        trace._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 the trace closes it
    else:
        monkeypatch.setattr(module, "LIMIT", 200)
    play(trace, range(30))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: the trace " + ("cannot be written" if full else "has 0 MiB"))
