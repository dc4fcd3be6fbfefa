"""The wall clock jumps by hours while a run is in progress, and nothing depends on it but time stamps."""

from __future__ import annotations

import json
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support.clock import HOUR, Clock
from tests.support.command import called
from tests.support.conduct import Ended, Running, halted, same
from tests.support.faults import fired
from tests.support.programs import Program

pytestmark = pytest.mark.timeout(300)

# A semaphore is waited for until a time of day, as libraries do whose C library knows no other wait.
WAITING = """
import ctypes, time

class Moment(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]

libc = ctypes.CDLL(None, use_errno=True)
semaphore = ctypes.create_string_buffer(64)
libc.sem_init(semaphore, 0, 0)
begin = time.monotonic()
until = Moment(int(time.time()) + 3600, 0)
print("waiting", time.time(), flush=True)
libc.sem_timedwait(semaphore, ctypes.byref(until))
print("woken", time.time(), time.monotonic() - begin, ctypes.get_errno(), flush=True)
"""


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def test_a_jump_is_seen_by_who_reads_the_clock_and_by_who_waits_for_it(clock: Clock) -> None:
    with Program(sys.executable, "-c", WAITING, env=clock.environment) as program:
        program.wait_for("\n")
        clock.jump(hours=5)
        assert program.wait() == 0
        _, before, _, after, waited, error = program.output.split()
    assert float(after) - float(before) >= 5 * HOUR
    assert float(waited) < HOUR
    assert int(error) == 110  # ETIMEDOUT


def ages(running: Running, now: float) -> list[float]:
    """How old each stage's progress and the last checkpoint are, as an alert reckons it."""
    url = json.loads((running.run / "run.json").read_text())["metrics"]
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    return [
        now - float(value)
        for value in re.findall(r"^scpl_\w+_timestamp_seconds(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    ]


def test_a_wall_clock_that_jumps_changes_nothing_but_time_stamps(
    clock: Clock, undisturbed: Ended, tmp_path: Path
) -> None:
    faults = (  # places where the run holds still while the clock jumps
        Fault(action="stop", stage=1, phase="loading"),
        Fault(action="stop", stage=0, step=6, phase="forward"),
        Fault(action="stop", stage=1, step=13, phase="backward"),
    )
    settings = ["checkpoint.every_steps=4", "checkpoint.keep=10", "checkpoint.best=false"]
    settings += ["runtime.max_restarts=1"]
    with Running(tmp_path / "run", *settings, faults=faults, environment=clock.environment) as running:
        stage = halted(running, "1", 1)
        clock.jump(hours=-3)  # while the workers gather
        stage.send_signal(signal.SIGCONT)
        stage = halted(running, "0", 2)
        clock.jump(hours=5)
        stage.send_signal(signal.SIGCONT)
        stage = halted(running, "1", 3)
        running.wait_for_rows("checkpoint", 2)  # that of step 8 is published at this time, 16 and 20 are not
        later = ages(running, clock.now())
        clock.jump(hours=-2)
        earlier = ages(running, clock.now())
        stage.kill()  # the newest checkpoint is now the one with the oldest time stamp
        ended = running.end()
    same(ended, undisturbed)
    for age in later + earlier:
        assert -1 < age < HOUR
    assert len(later) == len(earlier) == 3
    (restart,) = ended.rows("restart")  # no jump ended anything, only the kill did
    assert "killed by SIGKILL" in restart["reason"]
    assert "replacing it (1 of 1)" in ended.screen
    start, again = ended.rows("start")
    assert start["step"] == 0
    assert again["step"] in (8, 12)  # the one of step 12 may not have been published before the kill
    times = [row["time"] for row in fired(ended.run)]  # written by the workers
    assert times[1] - times[0] < -2 * HOUR
    assert times[2] - times[1] > 7 * HOUR
    folder = ended.run / "checkpoints"
    names = [f"step-{step}" for step in (4, 8, 12, 16, 20)]
    created = [json.loads((folder / name / "manifest.json").read_text())["created"] for name in names]
    assert created[4] - created[1] < -6 * HOUR
    assert (folder / "latest").read_text() == "step-20\n"
    verified = called("checkpoint", "verify", ended.run).stdout
    assert re.findall(r"^(step-\d+): ok", verified, re.MULTILINE) == names
