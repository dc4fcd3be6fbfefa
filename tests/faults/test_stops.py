"""SIGTERM and SIGINT, whoever gets them and whatever it does at that moment: the run ends soon and in order."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from scpl_dist.run.faults import Fault
from scpl_dist.storage.checkpoints import named, verify
from tests.support.conduct import Ended, Running, halted
from tests.support.faults import fired
from tests.support.programs import until_nothing

pytestmark = pytest.mark.timeout(200)

SOON_S = 25.0
"""Less than any limit of the run, so that whatever ended it was the signal."""


def ended_by(number: signal.Signals, running: Running) -> Ended:
    """The end of a run that has got a signal."""
    begin = time.monotonic()
    ended = running.end()
    assert time.monotonic() - begin < SOON_S
    assert ended.code == 128 + number, ended.screen
    assert ended.exit_json["code"] == 128 + number
    assert f"stopped by {number.name}" in ended.exit_json["reason"]
    assert ended.exit_json["stage"] is None
    assert ended.screen.count("stopped by") == 1
    assert "Traceback" not in ended.screen
    assert "failed" not in ended.screen
    return ended


def stopped_before_the_first_step(number: signal.Signals, running: Running) -> None:
    ended = ended_by(number, running)
    reason = f"stopped by {number.name} before the first step"
    assert ended.exit_json["reason"] == reason
    assert reason in ended.last_line
    assert not (ended.run / "metrics.jsonl").exists()
    assert not list(ended.run.glob("checkpoints/*"))


def test_a_coordinator_that_has_only_just_begun_ends_the_run(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, phase="loading")  # no step is made, however late the signal comes
    with Running(tmp_path / "run", "runtime.max_restarts=3", faults=(fault,)) as running:
        running.importing("coordinator", "zmq").send_signal(signal.SIGTERM)
        stopped_before_the_first_step(signal.SIGTERM, running)


@pytest.mark.parametrize(
    ("number", "target", "stage", "phase"),
    [
        (signal.SIGINT, 1, 1, "loading"),  # before its hello
        (signal.SIGINT, 1, 0, "data"),  # after it: stage 0 reads the data set, and this one waits for that
        (signal.SIGTERM, 1, 1, "starting"),  # all have joined, and build their blocks
    ],
)
def test_a_worker_that_is_loading_ends_the_run(
    number: signal.Signals, target: int, stage: int, phase: str, tmp_path: Path
) -> None:
    fault = Fault(action="hang", stage=stage, phase=phase)
    with Running(tmp_path / "run", "runtime.max_restarts=3", faults=(fault,)) as running:
        until_nothing(lambda: not fired(running.run))
        running.role(str(target)).send_signal(number)
        stopped_before_the_first_step(number, running)


def test_a_worker_that_waits_in_native_code_ends_the_run(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, phase="joining")
    with Running(tmp_path / "run", "runtime.max_restarts=3", faults=(fault,)) as running:

        def missing() -> str:
            """What tells that stage 0 has opened the store, in which it then waits for stage 1: a connection to it."""
            ends = running.role("0").net_connections() if fired(running.run) else []
            connected = [end for end in ends if end.status == psutil.CONN_ESTABLISHED]
            own = {end.laddr.port for end in connected}
            return "" if any(end.raddr.port in own for end in connected) else "the store"

        until_nothing(missing)
        running.role("0").send_signal(signal.SIGINT)
        stopped_before_the_first_step(signal.SIGINT, running)


def test_a_launcher_that_is_still_importing_leaves_nothing(tmp_path: Path) -> None:
    with Running(tmp_path / "run") as running:
        running.importing("launcher", "libtorch").send_signal(signal.SIGTERM)
        assert running.wait(SOON_S) == -signal.SIGTERM  # a shell calls it 143
        assert running.output == ""
        until_nothing(running.processes, 5)
    assert not (tmp_path / "run").exists()


def test_a_launcher_ends_a_run_that_is_loading(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=0, phase="data")
    with Running(tmp_path / "run", "pipeline.stages=1", faults=(fault,)) as running:
        until_nothing(lambda: not fired(running.run))
        running.signal(signal.SIGTERM)
        stopped_before_the_first_step(signal.SIGTERM, running)


@pytest.mark.parametrize(
    ("role", "phase", "number"),
    [
        ("0", "evaluate", signal.SIGINT),
        ("0", "checkpoint", signal.SIGTERM),
        ("coordinator", "commit", signal.SIGINT),
    ],
)
def test_a_launcher_stops_a_run_with_a_checkpoint(
    role: str, phase: str, number: signal.Signals, tmp_path: Path
) -> None:
    fault = Fault.model_validate(
        {"action": "stop", "role": "coordinator" if role == "coordinator" else "worker", "phase": phase}
        | {"step": 4}
    )
    settings = ("run.epochs=40", "pipeline.stages=1", "checkpoint.every_steps=4")
    with Running(tmp_path / "run", *settings, faults=(fault,)) as running:
        process = halted(running, role, 1)  # so that the signal comes at this moment and no other
        running.signal(number)
        process.send_signal(signal.SIGCONT)
        ended = ended_by(number, running)
    (latest,) = named(ended.run, "latest")
    done = verify(latest)["position"]["step"]
    assert 4 <= done < 200
    assert {step for step, _ in ended.losses()} == set(range(done))
