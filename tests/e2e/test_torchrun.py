"""torchrun starts workers again, those of a host or all, also in another order: no bit of the result changes."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.commands.drain import drain
from scpl_dist.run.config import load
from scpl_dist.run.faults import Fault
from tests.support import own_loggers, reference
from tests.support.command import called
from tests.support.faults import encode, fired
from tests.support.hosts import Host, cluster
from tests.support.ports import free_port
from tests.support.programs import ROOT, Program, until_nothing
from tests.support.run_folder import losses, rows

pytestmark = pytest.mark.timeout(300)

VALUES = {"run.epochs": 4, "data.batch_size": 256, "data.augmentation": "none"}
CONDUCT = {"checkpoint.every_steps": 2, "metrics.port": 0, "control.insecure": True}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
WORKER = ("-m", "scpl_dist", "worker")


@pytest.fixture(scope="module")
def expected() -> reference.Reference:
    return reference.train(load(values=VALUES))


def write(path: Path, **values: object) -> Path:
    named = {key.replace("__", "."): value for key, value in values.items()}
    path.write_text(load(values=VALUES | CONDUCT | named).to_toml())
    return path


def same(run: Path, expected: reference.Reference) -> None:
    """Losses of all steps and blocks, and weights, with ``==``."""
    assert losses(run) == expected.losses
    called("export", run, run.with_suffix(".safetensors"))
    exported = load_file(run.with_suffix(".safetensors"))
    for name, tensor in reference.tensors(expected.trainables).items():
        assert torch.equal(exported[name], tensor), name


def ends(program: Program, code: int = 0) -> str:
    assert program.wait() == code, program.output
    return program.output


def groups(run: Path) -> list[int]:
    """The numbers of the groups of workers that have trained; those of each coordinator begin with 0."""
    return [row["group"] for row in rows(run, "start")]


def killed(*places: tuple[int, int]) -> Mapping[str, str]:
    """The environment of workers that are killed at these stages and steps."""
    return encode(*(Fault(action="kill", stage=stage, step=step, phase="forward") for stage, step in places))


def test_all_ranks_come_again_to_a_coordinator_of_its_own(
    tmp_path: Path, expected: reference.Reference
) -> None:
    run = tmp_path / "run"
    # One restart is enough for it: that torchrun ends the other two is no failure of theirs.
    config = write(
        tmp_path / "config.toml",
        pipeline__stages=3,
        runtime__max_restarts=1,
        control__port=free_port(),
    )
    service = (sys.executable, "-m", "scpl_dist", "coordinator", config, "--run-dir", run)
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=3", "--max-restarts=1")
    with (
        Program(*service) as coordinator,
        Program(*torchrun, *WORKER, config, "--no-coordinator", env=killed((1, 7))) as workers,
    ):
        said = ends(workers)
        ends(coordinator)
    assert said.count("closing signal SIGTERM") == 2
    assert "forcefully exiting" not in said  # they left in order, as soon as the death was known
    assert groups(run) == [0, 1]
    (restart,) = rows(run, "restart")
    assert (restart["number"], restart["stage"]) == (1, 1)
    same(run, expected)


def test_a_restart_goes_on_by_itself_where_rank_0_has_the_coordinator(
    tmp_path: Path, expected: reference.Reference
) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", pipeline__stages=2)
    script = (ROOT / "launch/one_host.sh", 2, "--port", free_port(), "--control-port", free_port())
    environment = {"PYTHON": sys.executable, **killed((1, 7), (0, 13))}
    with Program(*script, config, "--run-dir", run, env=environment) as workers:
        said = ends(workers)
    assert "forcefully exiting" not in said
    assert len(fired(run)) == 2
    assert groups(run) == [0, 0, 0]
    assert [row["number"] for row in rows(run, "restart")] == [1, 2]
    same(run, expected)


def test_workers_wait_for_a_coordinator_that_is_started_again(
    tmp_path: Path, expected: reference.Reference
) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", pipeline__stages=2, control__port=free_port())
    command = (sys.executable, "-m", "scpl_dist", "coordinator", config, "--run-dir", run, "--resume=auto")
    environment = encode(*(Fault(action="kill", role="coordinator", step=step) for step in (6, 13)))
    with contextlib.ExitStack() as stack:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
        workers = [
            stack.enter_context(Program(sys.executable, *WORKER, config, "--no-coordinator", env=rank))
            for rank in ranks
        ]
        for number in range(2):
            with Program(*command, env=environment) as coordinator:
                assert coordinator.wait() == -signal.SIGKILL, coordinator.output
            if number == 1:  # the first time they are perhaps still waiting for the connection to heal
                for worker in workers:
                    worker.wait_for("waiting for another one")
        ends(stack.enter_context(Program(*command, env=environment)))
        for worker in workers:  # the same processes all the time
            ends(worker)
    assert groups(run) == [0, 0, 0]
    same(run, expected)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_worker_of_the_rank_that_has_the_coordinator_is_drained_and_its_process_stays(
    stopped: bool, tmp_path: Path, expected: reference.Reference
) -> None:
    run = tmp_path / "run"
    config = write(
        tmp_path / "config.toml",
        pipeline__stages=2,
        pipeline__elastic=[1, 2],
        control__port=free_port(),
    )
    slow = encode(Fault(action="delay", stage=1, phase="forward", seconds=0.3, times=0))
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=2")
    with Program(*torchrun, *WORKER, config, "--run-dir", run, env=slow) as workers:

        def until_group(number: int) -> None:
            until_nothing(lambda: not (workers.ended or number in groups(run)))
            assert not workers.ended, workers.output

        until_group(0)
        first = psutil.Process(json.loads((run / "run.json").read_text())["pid"]).parent()
        assert first is not None
        drain(run, stage=0, replica=0)
        until_group(1)
        assert first.is_running()
        while stopped and not (run / "exit.json").exists():
            # Again: as it is about to leave the others, it may not hear the first one.
            first.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        code = workers.wait()
    assert groups(run) == [0, 1]
    exit_json = json.loads((run / "exit.json").read_text())
    if stopped:
        assert (exit_json["code"], code) == (143, 1), workers.output  # torchrun knows no other code
        assert (run / "checkpoints" / "latest").exists()
    else:
        assert (exit_json["code"], code) == (0, 0), workers.output
        same(run, expected)


def test_whoever_fails_tells_torchrun_why_and_the_first_one_how_the_run_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write(
        tmp_path / "config.toml",
        pipeline__stages=2,
        runtime__max_restarts=0,
        control__port=free_port(),
        log__to=[f"{own_loggers.__name__}:Hanging"],  # the coordinator needs a moment to end
    )
    fault = encode(Fault(action="raise", stage=1, step=3, phase="forward"))
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in map(str, range(2)):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment |= {"TORCHELASTIC_ERROR_FILE": str(tmp_path / rank), **fault}
            program = Program(sys.executable, *WORKER, config, "--run-dir", run, cwd=ROOT, env=environment)
            workers.append(stack.enter_context(program))
        first, failed = (ends(worker, code=1) for worker in workers)
    told = [json.loads((tmp_path / rank).read_text())["message"] for rank in "01"]
    assert told == [
        "the run ended: InjectedFault: a fault on purpose",
        "stage 1: InjectedFault: a fault on purpose",
    ]
    assert "InjectedFault" in failed
    assert "Aborted" not in failed
    assert "did not react" not in first + failed


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with cluster(3) as made:
        yield made


def test_a_worker_on_another_host_comes_again_and_all_others_stay(
    hosts: list[Host], tmp_path: Path, expected: reference.Reference
) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", pipeline__stages=2, control__host="host-a")
    programs = [
        host.start(
            *(*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--master-addr=host-a", "--max-restarts=1"),
            *(*WORKER, config, "--run-dir", run),
            env=killed((1, 7)),
        )
        for rank, host in enumerate(hosts[:2])
    ]
    first, second = map(ends, programs)
    assert ("(exitcode: -9)" in first, "(exitcode: -9)" in second) == (False, True)
    assert "SIGTERM" not in first
    assert groups(run) == [0, 1]
    assert len(rows(run, "restart")) == 1
    same(run, expected)


def test_a_lost_host_is_replaced_by_another_and_the_ranks_change(
    hosts: list[Host], tmp_path: Path, expected: reference.Reference
) -> None:
    goes, stays, comes = hosts  # ranks are in the order of the names
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", pipeline__stages=2, control__host=stays.name)
    service = stays.start(sys.executable, "-m", "scpl_dist", "coordinator", config, "--run-dir", run)

    def torchrun(host: Host, *faults: Fault) -> Program:
        rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={stays.name}:29500", "--rdzv-id=run")
        quick = "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=10"
        command = (*TORCHRUN, "--nnodes=2", *rendezvous, quick, f"--local-addr={host.name}")
        return host.start(*command, *WORKER, config, "--no-coordinator", env=encode(*faults))

    # Each host's fault has another number; those of the last two only note that the host has the stage.
    never = Fault(action="kill", stage=9)
    one = torchrun(stays, never, Fault(action="delay", stage=0, seconds=0))
    other = torchrun(goes, Fault(action="stop", stage=0, step=7, phase="forward"))
    until_nothing(lambda: not fired(run) and f"no stage stands still yet:\n{one.output}{other.output}")
    goes.reset()  # all of it is gone
    another = torchrun(comes, never, never, Fault(action="delay", stage=1, seconds=0))
    for program in (another, one, service):
        ends(program)
    assert sorted(row["fault"] for row in fired(run)) == [0, 1, 2]
    assert groups(run) == [0, 1]
    assert len(rows(run, "restart")) == 1
    same(run, expected)
