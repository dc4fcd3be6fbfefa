"""Workers that are lost, come and go while the others stay: no bit of the result changes."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scpl_dist.commands.drain import drain
from scpl_dist.run.faults import Fault
from tests.support import paced
from tests.support.conduct import IMPATIENT, Ended, Running, conduct, halted, same
from tests.support.faults import fired
from tests.support.programs import Program, until_nothing

pytestmark = pytest.mark.timeout(600)

SAVING = ("checkpoint.every_steps=2", "runtime.max_restarts=10")
# Time to look at the run, and to do something to it.
SLOW = Fault(action="delay", stage=0, phase="data", seconds=1.2, times=0)


def groups(running: Running, number: int) -> None:
    """Wait until so many groups of workers have begun to train."""
    running.wait_for_rows("start", number)


def pids(running: Running, *stages: str) -> list[int]:
    return [running.role(stage).pid for stage in stages]


@pytest.mark.parametrize("transport", ["rpc", "gloo"])
def test_each_stage_is_replaced_and_the_others_keep_their_processes(
    transport: str, undisturbed: Ended, tmp_path: Path
) -> None:
    faults = tuple(
        Fault(action="kill", stage=stage, step=step, phase=phase)
        for stage, step, phase in (
            (0, 5, "forward"),
            (1, 6, "receive"),
            (2, 8, "write"),
            (0, 11, "send"),
            (1, 13, "evaluate"),
        )
    )
    settings = (*SAVING, "pipeline.stages=3", f"pipeline.transport={transport}")
    with Running(tmp_path / "run", *settings, faults=faults) as running:
        before = dict(zip("012", pids(running, "0", "1", "2"), strict=True))
        coordinator = running.role("coordinator").pid
        seen = running.pids("0", "1", "2", "coordinator")
        ended = running.end()
    same(ended, undisturbed)
    assert sorted(row["fault"] for row in fired(ended.run)) == [0, 1, 2, 3, 4]
    assert seen.pop("coordinator") == {coordinator}
    numbers = {stage: len(seen[stage] | {pid}) for stage, pid in before.items()}
    assert numbers == {"0": 3, "1": 3, "2": 2}
    assert len(ended.rows("restart")) == 5
    assert [row["group"] for row in ended.rows("start")] == list(range(6))


@pytest.mark.parametrize("action", ["stop", "hang"])
def test_a_worker_that_stands_still_is_replaced(action: str, undisturbed: Ended, tmp_path: Path) -> None:
    fault = Fault(action="stop" if action == "stop" else "hang", stage=1, step=7, phase="backward")
    ended = conduct(tmp_path / "run", *SAVING, IMPATIENT, faults=(fault,))
    same(ended, undisturbed)
    (restart,) = ended.rows("restart")
    assert restart["cause"] in ("hang", "silent")  # a checkpoint may be waited for as well


@pytest.mark.parametrize("transport", ["rpc", "gloo"])
def test_who_cannot_connect_because_another_died_stays_also_when_the_next_one_dies(
    transport: str, undisturbed: Ended, tmp_path: Path
) -> None:
    settings = (*SAVING, "pipeline.stages=3", f"pipeline.transport={transport}")
    faults = (
        Fault(action="stop", stage=2, phase="joining"),
        # In each group: the second time another one shall die meanwhile.
        Fault(action="delay", stage=1, phase="starting", seconds=4, times=2),
    )
    with Running(tmp_path / "run", *settings, faults=faults) as running:
        waiting = halted(running, "2", 2)
        survivor, store = running.role("1"), running.role("0")
        until_nothing(lambda: not _connecting(survivor, store))
        store.kill()
        waiting.kill()
        until_nothing(lambda: len(fired(running.run)) < 3 and "stage 1 has not begun to build again")
        running.role("2").kill()
        ended = running.end()
        assert fired(running.run)[2]["pid"] == survivor.pid
    same(ended, undisturbed)
    assert sorted((row["cause"], row["stage"]) for row in ended.rows("restart")) == [
        ("died", 0),
        ("died", 2),
        ("died", 2),
    ]


def test_without_replacements_the_others_share_the_blocks_and_newcomers_get_their_part(
    undisturbed: Ended, tmp_path: Path
) -> None:
    settings = ("checkpoint.every_steps=2", "pipeline.stages=3", "pipeline.elastic=[1,3]")
    kill = Fault(action="kill", stage=1, step=3, phase="loss")
    with Running(tmp_path / "run", *settings, faults=(kill, SLOW)) as running:
        groups(running, 2)  # 2 stages, as the limit of restarts is 0
        drain(running.run, stage=1, replica=0)
        groups(running, 3)  # 1 stage
        with pytest.raises(ValueError, match=r"pipeline.elastic = \[1, 3\]"):
            drain(running.run, stage=0, replica=0)
        # The run waits for the newcomer, which has to import torch before it can say hello.
        stage = running.role("0")
        stage.suspend()
        with Program(sys.executable, "-m", "scpl_dist", "join", running.run) as joined:
            until_nothing(lambda: not _connected(joined.pid, running.run))
            stage.resume()
            groups(running, 4)
            assert not joined.ended
            joined.signal(signal.SIGTERM)  # it leaves as it came
            assert joined.wait(60) == 0, joined.output
        ended = running.end()
    same(ended, undisturbed)
    assert [row["stages"] for row in ended.rows("start")] == [3, 2, 1, 2, 1]
    assert len(ended.rows("restart")) == 1


def test_a_run_goes_on_when_all_workers_that_its_launcher_has_started_are_drained(tmp_path: Path) -> None:
    settings = ("run.epochs=100000", "pipeline.stages=1", "pipeline.elastic=[1,2]", "checkpoint.best=false")
    with Running(tmp_path / "run", *settings) as running:
        groups(running, 1)
        with Program(sys.executable, "-m", "scpl_dist", "join", running.run) as joined:
            groups(running, 2)
            running.role("0").terminate()
            groups(running, 3)
            time.sleep(12)  # with runtime.max_restarts = 0, a launcher without workers ends a run after 10 s
            assert not running.ended, running.output
            running.signal(signal.SIGTERM)
            ended = running.end()
            assert joined.wait(60) == 0, joined.output
    assert (ended.code, ended.exit_json["code"]) == (143, 143), ended.screen
    assert [row["stages"] for row in ended.rows("start")] == [1, 2, 1]


def test_a_worker_of_another_version_is_refused_and_the_run_goes_on(
    undisturbed: Ended, tmp_path: Path
) -> None:
    settings = (*SAVING, "pipeline.elastic=[1,3]")
    with Running(tmp_path / "run", *settings, faults=(SLOW,)) as running:
        groups(running, 1)
        config = (running.run / "config.toml").read_text()
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.toml").write_text(config.replace("lr = 0.002", "lr = 0.003"))
        (other / "run.json").write_text((running.run / "run.json").read_text())
        with Program(sys.executable, "-m", "scpl_dist", "join", other) as stranger:
            assert stranger.wait(60) == 2, stranger.output
            assert "configuration digest of this worker is" in stranger.output
        ended = running.end()
    same(ended, undisturbed)
    assert len(ended.rows("start")) == 1


def test_blocks_move_to_where_they_are_computed_faster(tmp_path: Path) -> None:
    settings = (*paced.settings(tmp_path, 0.05), "run.epochs=12", "checkpoint.best=false")
    calm = conduct(tmp_path / "calm", *settings, "pipeline.stages=1")
    moved = conduct(tmp_path / "moved", *settings, "pipeline.partition=[3,1]", "pipeline.balance=auto")
    same(moved, calm)
    assert [(row["from"], row["to"]) for row in moved.rows("move")] == [([3, 1], [2, 2])]
    assert [row["group"] for row in moved.rows("start")] == [0, 1]
    assert not moved.rows("restart")


def test_a_worker_that_is_held_back_gets_fewer_blocks_and_gets_them_back(tmp_path: Path) -> None:
    settings = (
        *paced.settings(tmp_path, 0.025),
        "run.epochs=45",
        "data.batch_size=64",
        "checkpoint.best=false",
    )
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    fast.touch()
    calm = conduct(tmp_path / "calm", *settings, "pipeline.stages=1")
    fast.unlink()
    with Running(tmp_path / "run", *settings, "pipeline.stages=2", "pipeline.balance=auto") as running:
        groups(running, 1)
        pid = running.role("1").pid
        slow.write_text(str(pid))
        running.wait_for_rows("move", 1)
        slow.unlink()
        running.wait_for_rows("move", 2)
        groups(running, 3)
        assert running.role("1").pid == pid
        fast.touch()
        ended = running.end()
    same(ended, calm)
    moves = [(row["from"], row["to"]) for row in ended.rows("move")]
    assert moves[:2] == [([2, 2], [3, 1]), ([3, 1], [2, 2])], moves
    assert not ended.rows("restart")


def test_survivors_do_not_grow(tmp_path: Path) -> None:
    kills = [Fault(action="kill", stage=1, step=step, phase="forward") for step in range(2, 20, 2)]
    looks = {
        3: Fault(action="stop", stage=1, step=7),
        9: Fault(action="stop", stage=1, step=19),
    }  # after so many kills
    with Running(tmp_path / "run", *SAVING, faults=(*kills, *looks.values())) as running:
        sizes: list[tuple[int, int]] = []
        survivor = running.role("0")
        coordinator = running.role("coordinator")
        for number, killed in enumerate(looks, 1):
            stage = halted(running, "1", killed + number)
            time.sleep(2.5)  # the threads that watch over a regrouping live for 2 s
            sizes.append(_size(survivor, coordinator))
            stage.resume()
        ended = running.end()
    assert ended.code == 0, ended.screen
    assert len(ended.rows("start")) == len(kills) + 1
    early, late = sizes  # libraries are loaded and pools filled by then
    assert late[0] <= early[0] + 2, sizes
    assert late[1] <= early[1] + 4, sizes


def _connected(pid: int, run: Path) -> bool:
    """Whether a process has a connection to the coordinator of a run."""
    port = int(json.loads((run / "run.json").read_text())["control"].rpartition(":")[2])
    ends = psutil.Process(pid).net_connections()
    return any(end.status == psutil.CONN_ESTABLISHED and end.raddr.port == port for end in ends)


def _connecting(worker: psutil.Process, first: psutil.Process) -> bool:
    """Whether a worker that connects to all others has reached the first one's store, and waits for the rest."""

    def listening(process: psutil.Process) -> set[int]:
        ends = process.net_connections()
        return {end.laddr.port for end in ends if end.status == psutil.CONN_LISTEN}

    ends = [end for end in worker.net_connections() if end.status == psutil.CONN_ESTABLISHED]
    reached = any(end.raddr.port in listening(first) for end in ends)
    return reached and len(listening(worker)) > 1  # its door, and where the transport listens


def _size(*processes: psutil.Process) -> tuple[int, int]:
    """Threads and open files."""

    def total(count: Callable[[psutil.Process], int]) -> int:
        return sum(map(count, processes))

    return total(psutil.Process.num_threads), total(psutil.Process.num_fds)
