"""Whatever stands still is found from outside, named with its place, and its stack is in the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support.conduct import IMPATIENT, Ended, conduct

pytestmark = pytest.mark.timeout(400)

LIMITS = (IMPATIENT, "runtime.first_step_timeout_s=30")


def stacks(ended: Ended, stage: int) -> str:
    path = ended.run / "log" / f"stage{stage}.stacks"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("action", "stage", "own"),
    [("stop", 1, False), ("hold", 0, True), ("hang", 1, True)],
    ids=["stopped by SIGSTOP", "holds the interpreter lock", "sleeps for ever"],
)
def test_a_stage_that_stands_still_is_named(action: str, stage: int, own: bool, tmp_path: Path) -> None:
    fault = Fault.model_validate({"action": action, "stage": stage, "step": 7, "phase": "backward"})
    ended = conduct(tmp_path / "run", *LIMITS, faults=(fault,))
    assert ended.code == 1, ended.screen
    found = ended.exit_json
    assert f"stage {stage}" in ended.last_line
    assert (found["stage"], found["rank"]) == (stage, stage)
    if action == "hang":  # its control thread still told where it is
        assert (found["step"], found["phase"], found["micro_batch"]) == (7, "backward", 0)
    assert found["step"] in range(5, 8)  # the last heartbeat may be half a second old
    assert found["phase"]
    assert found["host"] in ended.screen
    assert str(found["pid"]) in ended.screen
    assert "Thread" in stacks(ended, 1 - stage)  # of the one that waited
    assert ("faults.py" in stacks(ended, stage)) == own  # where it stood; a stopped process cannot say


def test_a_message_that_never_arrives_is_a_deadlock_of_all(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, step=7, phase="receive")
    ended = conduct(tmp_path / "run", *LIMITS, faults=(fault,))
    assert ended.code == 1, ended.screen
    assert ended.exit_json["cause"] == "deadlock"
    assert "all stages have only waited" in ended.last_line
    assert "stage 0: room" in ended.last_line  # no room in front of stage 1, which takes nothing
    assert "stage 1: receive" in ended.last_line
    for stage in (0, 1):
        assert "Thread" in stacks(ended, stage)


def test_a_disk_that_does_not_answer_is_no_riddle(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, step=8, phase="write")
    ended = conduct(
        tmp_path / "run", *LIMITS, "checkpoint.every_steps=4", "checkpoint.best=false", faults=(fault,)
    )
    assert ended.code == 1, ended.screen
    assert "stage 1" in ended.last_line
    assert ended.exit_json["phase"] == "checkpoint"
    assert "slow" in ended.screen
    assert (ended.run / "checkpoints" / "step-4" / "manifest.json").exists()
    last = max(block for _, block in ended.losses())
    trained = {step for step, block in ended.losses() if block == last}
    assert trained == set(range(12))  # it went on beside the writing, up to the checkpoint after it


def test_a_slow_stage_is_one_warning(tmp_path: Path) -> None:
    fault = Fault(action="delay", stage=1, phase="forward", seconds=0.25, times=0)
    ended = conduct(tmp_path / "run", "run.epochs=8", "pipeline.partition=[1, 3]", faults=(fault,))
    assert ended.code == 0, ended.screen
    assert ended.screen.count("holds the others back") == 1
    (warning,) = ended.rows("warning")
    assert warning["stage"] == 1
