"""Whatever ends a run: exit code 1 in time, the root cause last on the screen, exit.json, no process left over."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from scpl_dist.run.config import load
from scpl_dist.run.faults import Fault
from scpl_dist.storage.checkpoints import steps
from tests.support.command import scpl_dist
from tests.support.conduct import IMPATIENT, IMPATIENT_S, Ended, Running, conduct, halted, same
from tests.support.ports import free_port
from tests.support.programs import Program

pytestmark = pytest.mark.timeout(400)


def failed(ended: Ended, *words: str, stage: int | None, limit_s: float = 120) -> None:
    """The run failed as promised, and both the screen's end and exit.json name the cause."""
    assert ended.code == 1, ended.screen
    assert ended.seconds < limit_s
    for word in words:
        assert word in ended.last_line, ended.screen
        assert word in ended.exit_json["reason"]
    assert ended.exit_json["code"] == 1
    assert ended.exit_json["stage"] == stage
    if stage is not None:
        assert ended.exit_json["host"]
        assert ended.exit_json["rank"] == stage
        assert ended.exit_json["pid"] > 0


@pytest.mark.parametrize(("stage", "phase"), [(0, "forward"), (1, "starting")])
def test_a_killed_worker_is_named_with_its_place(stage: int, phase: str, tmp_path: Path) -> None:
    step = 0 if phase == "starting" else 7
    ended = conduct(tmp_path / "run", faults=(Fault(action="kill", stage=stage, step=step, phase=phase),))
    failed(ended, f"stage {stage}", "SIGKILL", stage=stage)
    assert ended.exit_json["cause"] == "died"
    assert ended.exit_json["micro_batch"] in (0, None)
    assert ended.exit_json["step"] in range(step + 1)  # as far as its last heartbeat told


def test_a_worker_that_is_killed_before_it_joins_is_named(tmp_path: Path) -> None:
    fault = Fault(action="stop", stage=1, phase="loading")
    with Running(tmp_path / "run", faults=(fault,)) as running:
        halted(running, "1", 1).kill()
        ended = running.end()
    assert ended.code == 1, ended.screen
    assert "the worker of rank 1 ended before it joined the run (killed by SIGKILL)" in ended.last_line
    assert (ended.exit_json["cause"], ended.exit_json["stage"]) == ("died", 1)


def test_a_crowd_at_the_ports_changes_nothing(undisturbed: Ended, tmp_path: Path) -> None:
    fault = Fault(action="stop", stage=1, step=6)
    crowd = 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (crowd, hard))  # which the run inherits
    try:
        running = Running(
            tmp_path / "run", "checkpoint.every_steps=4", "checkpoint.best=false", faults=(fault,)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running, contextlib.ExitStack() as connections:
        connections.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        stage = halted(running, "1", 1)
        ports = {
            end.laddr
            for process in running.processes()
            for end in process.net_connections()
            if end.status == psutil.CONN_LISTEN and process.pid != stage.pid  # it would take none
        }
        assert len(ports) >= 2  # control and metrics
        for address in ports:
            for _ in range(crowd):
                connections.enter_context(socket.create_connection(address, 10))
        stage.send_signal(signal.SIGCONT)
        ended = running.end()
    same(ended, undisturbed)
    assert [row["step"] for row in ended.rows("checkpoint")] == [4, 8, 12, 16, 20]


def test_a_killed_coordinator_ends_the_run(tmp_path: Path) -> None:
    ended = conduct(tmp_path / "run", faults=(Fault(action="kill", role="coordinator", step=7),))
    failed(ended, "the coordinator", "SIGKILL", stage=None)


def test_a_stopped_coordinator_ends_the_run(tmp_path: Path) -> None:
    fault = Fault(action="stop", role="coordinator", step=7)
    ended = conduct(tmp_path / "run", IMPATIENT, faults=(fault,))
    failed(ended, "the coordinator", "stopped", stage=None)


def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    with Running(tmp_path / "run", "run.epochs=500") as running:
        running.wait_for_rows("train", 5)
        running.signal(signal.SIGKILL)
        ended = running.end()
        assert ended.exit_json["code"] == 1
        assert "the launcher is gone" in ended.last_line


def test_a_killed_torchrun_takes_everything_with_it(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(load().to_toml())
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, "-m", "scpl_dist", "worker", str(config))
    settings = ("run.epochs=500", f"control.port={free_port()}")
    with Running(tmp_path / "run", *settings, command=command) as running:
        running.wait_for_rows("train", 5, limit_s=280)
        running.signal(signal.SIGKILL)
        ended = running.end()
    assert ended.exit_json["code"] == 1
    assert "the launcher is gone" in ended.exit_json["reason"]


def test_a_worker_with_another_configuration_is_refused(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    ours, theirs = tmp_path / "ours.toml", tmp_path / "theirs.toml"
    values = {"pipeline.stages": 1, "metrics.port": 0, "control.port": port}
    ours.write_text(load(values=values).to_toml())
    theirs.write_text(load(values=values | {"run.seed": 1}).to_toml())
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    worker = (sys.executable, "-m", "scpl_dist", "worker", theirs, "--run-dir", run, "--no-coordinator")
    with Program(*worker, env=alone) as refused:
        done = scpl_dist("coordinator", ours, "--run-dir", run, code=2)
        assert refused.wait(60) == 2, refused.output
    last = done.stderr.rstrip().splitlines()[-1]
    for digest in (load(ours).digest(), load(theirs).digest()):
        assert digest in last
    found = json.loads((run / "exit.json").read_text())
    assert (found["code"], found["cause"], found["stage"]) == (2, "config", 0)


def test_an_error_in_a_block_shows_its_traceback_and_place(tmp_path: Path) -> None:
    source = """
        from torch import nn

        class Faulty(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.calls = nn.Linear(32, 32), 0

            def forward(self, x):
                self.calls += self.training
                if self.calls == 8:
                    raise ArithmeticError("the block's own words")
                return self.layer(x).relu()

        def blocks(classes):
            return [nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 32)), Faulty()]
    """
    file = tmp_path / "model.py"
    file.write_text(textwrap.dedent(source))
    ended = conduct(tmp_path / "run", f'model.name="{file}:blocks"')
    failed(ended, "ArithmeticError: the block's own words", stage=1)
    assert ended.exit_json["step"] == 7
    assert ended.exit_json["micro_batch"] == 0
    assert ended.exit_json["phase"] == "forward"
    assert 'raise ArithmeticError("the block' in ended.screen
    assert "model.py" in ended.exit_json["traceback"]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path: Path) -> None:
    ended = conduct(tmp_path / "run", "optimizer.lr=1e38", "runtime.max_restarts=3")
    assert ended.code == 1, ended.screen
    assert "nan" in ended.last_line or "inf" in ended.last_line
    assert "the update was not made" in ended.last_line
    assert ended.exit_json["cause"] == "nonfinite"
    assert ended.exit_json["stage"] in (0, 1)
    assert ended.exit_json["step"] >= 1
    assert not ended.rows("restart")  # it would come to the same


def test_weights_that_are_not_finite_are_never_saved_though_every_loss_was(tmp_path: Path) -> None:
    source = """
        from torch import nn

        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(32, 32)
                self.calls = 0

            def forward(self, x):
                self.calls += self.training
                nothing = (self.layer.weight.sum() * 0).abs().sqrt()  # 0, and its gradient is NaN
                return self.layer(x) + (nothing if self.calls == 5 else 0)

        def blocks(classes):
            return [nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 32)), Root()]
    """
    file = tmp_path / "model.py"
    file.write_text(textwrap.dedent(source))
    settings = ["run.epochs=1", "checkpoint.every_steps=2", "checkpoint.best=false", "runtime.max_restarts=3"]
    ended = conduct(tmp_path / "run", f'model.name="{file}:blocks"', *settings)
    failed(ended, "weight layer.weight of block 1 is NaN or infinite", "not saved", stage=1)
    assert ended.exit_json["cause"] == "nonfinite"
    assert len(ended.rows("train")) == 10  # both blocks' losses of all 5 steps were finite
    # Step 4 is there only if the other stage had written its part before the run ended; step 5 is not in any case.
    assert [path.name for path in steps(ended.run)] in (["step-2"], ["step-2", "step-4"])
    assert not ended.rows("restart")


def test_a_worker_that_never_arrives_is_missed(tmp_path: Path) -> None:
    fault = Fault(action="stop", stage=1, phase="loading")
    ended = conduct(tmp_path / "run", IMPATIENT, faults=(fault,))
    failed(ended, f"no worker for stage 1 within {IMPATIENT_S} s", stage=None)


def test_a_crash_in_native_code_shows_where(tmp_path: Path) -> None:
    fault = Fault(action="crash", stage=1, step=6, phase="backward")
    ended = conduct(tmp_path / "run", faults=(fault,))
    failed(ended, "stage 1", "SIGSEGV", stage=1)
    assert "Fatal Python error: Segmentation fault" in ended.screen
    assert "executor.py" in ended.exit_json["traceback"]


def test_out_of_memory_says_where_and_what_to_lower(tmp_path: Path) -> None:
    fault = Fault(action="memory", stage=0, step=6, phase="backward")
    ended = conduct(tmp_path / "run", faults=(fault,))
    failed(ended, "out of memory", "MiB", stage=0)
    assert (ended.exit_json["step"], ended.exit_json["phase"]) == (6, "backward")
    assert "lower data.batch_size" in ended.screen


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    number = signal.SIGINT
    fault = Fault(action="stop", stage=1, step=7)
    with Running(tmp_path / "run", "run.epochs=500", faults=(fault,)) as running:
        halted(running, "1", 1)  # so that the checkpoint that the first signal asks for never comes
        running.signal(number)
        running.wait_for(f"{number.name}: writing a checkpoint")  # of two at once the kernel may deliver one
        running.signal(number)
        ended = running.end(limit_s=30)
    assert ended.code == 128 + number, ended.screen
    assert ended.exit_json["code"] == 128 + number
