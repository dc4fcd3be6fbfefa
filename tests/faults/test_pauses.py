"""Processes that are stopped for a while, and then go on: a machine that was asleep, a host that was migrated.

A pause is longer than any limit that is shorter than ``runtime.timeout_s`` may be, so it takes its time.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support.conduct import IMPATIENT, IMPATIENT_S, Ended, Running, halted, same

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize(("role", "who"), [("coordinator", "coordinator"), ("worker", "1")])
def test_who_is_stopped_for_less_than_the_time_out_goes_on(
    role: str, who: str, undisturbed: Ended, tmp_path: Path
) -> None:
    fault = Fault.model_validate(
        {"action": "stop", "role": role, "step": 6} | ({"stage": 1} if who == "1" else {})
    )
    with Running(tmp_path / "run", faults=(fault,)) as running:
        process = halted(running, who, 1)
        time.sleep(IMPATIENT_S)  # the pause itself; the time-out of this run is 60 s
        process.send_signal(signal.SIGCONT)
        ended = running.end()
    same(ended, undisturbed)
    pauses = [
        row["text"] for row in ended.rows("warning") if "the coordinator did not run for" in row["text"]
    ]
    assert len(pauses) == (role == "coordinator")


def test_a_machine_that_was_asleep_goes_on_though_a_checkpoint_was_under_way(
    undisturbed: Ended, tmp_path: Path
) -> None:
    fault = Fault(action="stop", stage=1, phase="write", step=8)
    settings = (IMPATIENT, "checkpoint.every_steps=4", "checkpoint.best=false")
    with Running(tmp_path / "run", *settings, faults=(fault,)) as running:
        halted(running, "1", 1)
        running.wait_for_rows("checkpoint", 1)
        processes = running.processes()
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(IMPATIENT_S + 3)  # longer than the time-out
        for process in processes:
            process.send_signal(signal.SIGCONT)
        ended = running.end()
    same(ended, undisturbed)
    assert [row["step"] for row in ended.rows("checkpoint")] == [4, 8, 12, 16, 20]
