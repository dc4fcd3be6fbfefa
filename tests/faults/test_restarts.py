"""A run that is killed again and again comes to the result of an undisturbed one, to the last bit."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support.conduct import Ended, Running, conduct, same
from tests.support.faults import fired
from tests.support.programs import until_nothing

pytestmark = pytest.mark.timeout(600)


def test_kills_of_every_kind_change_nothing(undisturbed: Ended, tmp_path: Path) -> None:
    faults = (
        Fault(action="kill", stage=1, phase="starting"),  # nobody has begun
        Fault(action="kill", stage=0, step=2, phase="forward"),  # before the first checkpoint
        Fault(action="kill", stage=1, step=4, phase="write"),  # half a checkpoint
        Fault(action="kill", role="coordinator", step=8, phase="commit"),  # all parts, no manifest
        Fault(action="delay", stage=0, step=18, phase="forward", seconds=5),  # time to look at the metrics
    )
    settings = ("checkpoint.every_steps=4", "runtime.max_restarts=4")
    with Running(tmp_path / "run", *settings, faults=faults) as running:
        running.wait_for_rows("restart", 4, limit_s=300)
        running.wait_for_rows("start", 4)  # one start died before it began
        url = json.loads((running.run / "run.json").read_text())["metrics"]
        with urllib.request.urlopen(url, timeout=20) as answer:
            metrics = answer.read().decode()
        ended = running.end()
    counts = dict(re.findall(r'^scpl_restarts_total{reason="(\w+)"} ([\d.]+)$', metrics, flags=re.MULTILINE))
    assert counts.pop("coordinator_lost") == "1.0"
    assert sum(map(float, counts.values())) == 3, counts
    assert [row["fault"] for row in fired(ended.run)] == [0, 1, 2, 3, 4]
    assert ended.screen.count(": replacing it (") == 3
    assert "restart 4 of 4 from the last good checkpoint" in ended.screen
    same(ended, undisturbed)


def test_kills_at_both_ends_of_a_run_and_between_two_stages_change_nothing(
    undisturbed: Ended, tmp_path: Path
) -> None:
    faults = (
        Fault(action="kill", role="coordinator", phase="gathering"),  # the workers have nobody to come to
        Fault(action="kill", stage=0, step=6, phase="send"),  # the next stage never gets the message
        Fault(action="kill", stage=1, step=9, phase="evaluate"),
        Fault(action="kill", stage=1, step=19, phase="idle"),  # has done everything, and not said so
    )
    settings = ("checkpoint.every_steps=4", "runtime.max_restarts=4")
    ended = conduct(tmp_path / "run", *settings, faults=faults)
    same(ended, undisturbed)
    assert [row["fault"] for row in fired(ended.run)] == [0, 1, 2, 3]
    assert [row["phase"] for row in fired(ended.run)] == [fault.phase for fault in faults]
    assert len(ended.rows("restart")) == 4


def test_a_failure_that_comes_again_and_again_is_not_repeated_for_ever(tmp_path: Path) -> None:
    fault = Fault(action="raise", stage=1, step=5, phase="loss", times=0)
    ended = conduct(tmp_path / "run", "runtime.max_restarts=50", "checkpoint.every_steps=3", faults=(fault,))
    assert ended.code == 1
    assert len(ended.rows("restart")) == 1
    assert "the same failure came 2 times in a row" in ended.screen
    assert "InjectedFault: a fault on purpose" in ended.last_line
    assert ended.exit_json["step"] == 5
    last = max(block for _, block in ended.losses())  # of the stage that fails; the other may be steps ahead
    assert sorted(step for step, block in ended.losses() if block == last) == [0, 1, 2, 3, 4]


def test_a_stopped_run_goes_on_with_another_number_of_stages(undisturbed: Ended, tmp_path: Path) -> None:
    number = signal.SIGTERM
    slow = Fault(action="delay", step=8, phase="evaluate", seconds=8)
    with Running(tmp_path / "run", "checkpoint.every_steps=8", faults=(slow,)) as running:
        running.wait_for_rows("train", 4 * 8)
        running.role("1").send_signal(number)  # to a worker, by hand
        ended = running.end()
    assert ended.code == 128 + number, ended.screen
    assert f"stopped by {number.name}" in ended.screen
    assert ended.exit_json["code"] == 128 + number
    ended = conduct(tmp_path / "run", "pipeline.stages=3", options=("--resume", "auto"))
    assert "going on after step" in ended.screen
    same(ended, undisturbed)


def test_a_stop_before_the_first_step_is_no_failure(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, phase="loading")
    with Running(tmp_path / "run", faults=(fault,)) as running:
        until_nothing(lambda: not (tmp_path / "run" / "run.json").exists() and "no coordinator")
        running.signal(signal.SIGTERM)
        ended = running.end()
    assert ended.code == 143, ended.screen
    assert "stopped by SIGTERM before the first step" in ended.screen
