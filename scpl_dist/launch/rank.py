"""The worker of one rank, under any launcher.

Under torchrun rank 0 also starts the coordinator, as a child, and ends after it, also when its worker has been drained;
the local launcher and a cluster with a coordinator of its own start workers only.

    torchrun --max-restarts N       a coordinator of its own         rank 0 has started the coordinator
    a worker dies on this host      all of this host come anew,      all end, and the next coordinator goes on
                                    the coordinator stays            from the last checkpoint
    a worker dies on another one    it comes anew, all others stay   it comes anew, all others stay
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from scpl_dist.control.channel import STOPS
from scpl_dist.coordinator.restarts import End, Restarts
from scpl_dist.launch.coordinator_process import CoordinatorProcess, conclude
from scpl_dist.launch.local import note_restart
from scpl_dist.launch.preflight import preflight
from scpl_dist.launch.process import ended, kill, spawn
from scpl_dist.run import config as configuration
from scpl_dist.run import network, open_files
from scpl_dist.run.config import Config
from scpl_dist.run.descent import die_with_parent
from scpl_dist.run.failures import Cause
from scpl_dist.storage.checkpoints import CheckpointError, steps
from scpl_dist.storage.durable import write_text
from scpl_dist.storage.resume import begin
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.worker import Worker

MARK = ".torchrun"  # in the run folder: which torchrun has begun the run


def local(run_dir: str, control: str) -> int:
    """Be a worker of the local launcher; returns the exit code."""
    config = configuration.load(Path(run_dir, "config.toml"))
    rank = _ranks(config)[0]
    return _work(Worker(config, Path(run_dir), control, rank, config.layout.workers[rank].file))[0]


def join(run_dir: Path) -> int:
    """Be a worker that a run was not started with; returns the exit code, 2 if there is no place for it.

    ValueError if no run is in progress in this folder.
    """
    run = RunFolder(run_dir).in_progress()
    config = configuration.load(run_dir / "config.toml")
    open_files.raise_limit()
    os.environ.setdefault("OMP_NUM_THREADS", str(config.runtime.threads))
    if network.is_loopback(network.split_endpoint(run["control"])[0]):  # all workers are on this machine
        os.environ |= dict.fromkeys(network.VARIABLES, config.runtime.interface or network.loopback())
    code, reason = _work(Worker(config, run_dir, run["control"], None))
    if reason:
        print(f"error: {reason}", file=sys.stderr)
    return code


def main(config: Config, run_dir: Path | None, control: str | None, companion: bool, resume: str) -> int:
    """Be the worker of this rank in a cluster; ranks come from the environment, as torchrun sets it.

    `run_dir` None is the coordinator's; `control` is the address of the coordinator, None for control.host and
    control.port; with `companion` rank 0 starts the coordinator, and tells it what to `resume`. Returns the exit code.
    """
    die_with_parent()
    open_files.raise_limit()
    fixed = config.model_copy(update={"control": config.control.fixed()})
    try:
        rank, world_size = _ranks(config)
        if control is None:
            _check_reachable(fixed, world_size)
            control = f"tcp://{fixed.control.host}:{fixed.control.port}"
        if companion and run_dir is None and _torchrun("MAX_RESTARTS"):
            raise ValueError(
                "torchrun --max-restarts: a start after a failure goes on from the last checkpoint, so the run needs a "
                "folder that is the same each time; give it with --run-dir"
            )
        if companion and rank == 0:
            code, reason = _lead(fixed, run_dir, resume, world_size)
        elif refusal := _refusal(run_dir):
            code, reason = 1, refusal
        else:
            code, reason = _work(Worker(config, run_dir, control, rank, service=not companion))
    except (ValueError, CheckpointError) as error:
        _tell_torchrun(str(error))
        raise
    if code != 0:
        _tell_torchrun(reason)
    return code


def _tell_torchrun(reason: str) -> None:
    """Let the reason stand in torchrun's report, which comes last on the screen."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason, "timestamp": int(time.time())}))


def _work(worker: Worker) -> tuple[int, str]:
    """Exit code of a worker that runs to its end, and why it is not 0."""
    faulthandler.enable()
    torch.set_num_threads(worker.config.runtime.threads)
    return worker.run(), worker.reason


def _torchrun(name: str) -> int:
    """A number that torchrun tells its workers; 0 without torchrun."""
    return int(os.environ.get(f"TORCHELASTIC_{name}", "0"))


def _this_torchrun() -> str:
    """Tells the torchrun that has started this process from every other one, whatever its restarts."""
    agent = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {agent.pid} {agent.create_time()}"


def _refusal(run_dir: Path | None) -> str | None:
    """Why a worker that torchrun has started again is not needed: the run is over, and would come to the same end."""
    if run_dir is None or not _torchrun("RESTART_COUNT"):
        return None
    found = RunFolder(run_dir).read("exit.json")
    return None if found is None else _refused(Restarts(sys.maxsize), _ended(found))


def _refused(restarts: Restarts, end: End) -> str | None:
    refusal = restarts.refusal(end)
    return None if refusal is None else f"{refusal}\n  cause:      {end.reason}"


def _ended(found: dict[str, Any], step: int = -1) -> End:
    """How the start before ended, by its exit.json; `step` is the last that it has done."""
    end = End.of(found, step)
    # Of the coordinator's parent, which was a worker: this one has come in its place.
    return replace(end, cause=Cause.DIED) if end.cause == Cause.LAUNCHER_LOST else end


def _end_before(config: Config, run_dir: Path | None, restarts: Restarts) -> End | None:
    """How the start before this one ended, if torchrun has started all again; `restarts` hears of those before it.

    None also if that start did not even begin: then what the user said of the folder still holds.
    """
    count = _torchrun("RESTART_COUNT")
    if not count or run_dir is None:
        return None
    mark = run_dir / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != _this_torchrun():
        return None
    folder = RunFolder(run_dir)
    run = folder.read("run.json")
    if run is not None and folder.read("exit.json") is None:
        with contextlib.suppress(psutil.Error):
            psutil.Process(run["pid"]).wait(
                10
            )  # the coordinator outlives its parent, to say how the run ended
    rows = [row for row in folder.metrics.rows() if row["event"] == "restart" and "step" in row]
    for row in rows[len(rows) - (count - 1) :]:
        restarts.refusal(End(1, row["cause"], row["reason"], row["stage"], row["step"]))
    found = folder.read("exit.json") or {"code": 1, "reason": "all workers ended, and the coordinator, too"}
    return _ended(found, folder.metrics.last_step(bool(config.block)))


def _lead(config: Config, run_dir: Path | None, resume: str, world_size: int) -> tuple[int, str]:
    """Be rank 0 under torchrun: start the coordinator, work, and end after it.

    If torchrun has started all workers again, the run goes on from its last checkpoint, unless that is of no use.
    """
    restarts = Restarts(config.runtime.max_restarts)
    end = _end_before(config, run_dir, restarts)
    if end is not None and run_dir is not None:
        refusal = _refused(restarts, end)
        if refusal is not None:
            return end.code or 1, refusal
        resume = "auto" if resume == "never" or steps(run_dir) else resume
    restore, manifest, seen = begin(run_dir, resume, config)
    labels: dict[str, list[int]] = {}
    preflight(config, position=manifest.get("position"), labels=labels.update)
    folder = RunFolder.create(run_dir, config, resume=resume != "never")
    with folder.taken(config, labels, seen):
        if _torchrun("MAX_RESTARTS"):
            write_text(folder.path / MARK, _this_torchrun())
        refusal = None if end is None else note_restart(end, restarts, folder, restore)
        if refusal is not None:
            return 1, refusal
        # When a worker of this host fails torchrun ends all that are here, and this process, too.
        elsewhere = network.workers_here(world_size) < world_size
        replaceable = elsewhere and _torchrun("MAX_RESTARTS") > 0
        coordinator = CoordinatorProcess(
            folder, spawn, restore, restarts.causes, replaceable=replaceable, led=True
        )
        process = coordinator.process
        endpoint = coordinator.endpoint(lambda: ended(process) is None)
        code = 1 if endpoint is None else _work(Worker(config, folder.path, endpoint, 0))[0]
        if code:
            coordinator.close()  # it waits for no more workers to come, but for those that are there to leave
        else:  # drained, perhaps, while the others go on
            for number in STOPS:
                signal.signal(
                    number, lambda number, frame: coordinator.tell({"event": "signal", "number": number})
                )
        if coordinator.wait(10 if code else config.runtime.timeout_s + 20) is None:
            kill([process])
        found = folder.read("exit.json")
        if found is None:
            found = {"code": 1, "reason": "the coordinator did not finish the run"}
            conclude(folder, 1, found["reason"], Cause.COORDINATOR_LOST)
    return found["code"] or code, f"the run ended: {found['reason']}"


def _ranks(config: Config) -> tuple[int, int]:
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        raise ValueError(
            f"the environment has no {error}: a worker is started by torchrun ... -m scpl_dist worker CONFIG.toml; "
            "scpl-dist train starts all stages on this machine"
        ) from None
    pipeline, world = config.pipeline, config.layout.world
    if world_size != world:
        replicas = f" and pipeline.replicas = {pipeline.replicas}" if world != pipeline.stages else ""
        raise ValueError(
            f"pipeline.stages = {pipeline.stages}{replicas}: torchrun starts {world_size} processes (--nnodes times "
            f"--nproc-per-node), and the run has {world} workers; make the two numbers equal"
        )
    return rank, world_size


def _check_reachable(config: Config, world_size: int) -> None:
    host = config.control.host
    several = network.workers_here(world_size) < world_size
    if several and network.is_loopback(network.resolve(host, "control.host")):  # which serves one host only
        raise ValueError(
            f"control.host = {host!r}: the run has stages on several hosts, which cannot reach this address; set it to "
            f"the name or address of the first host (torchrun has {os.environ.get('MASTER_ADDR', 'none')})"
        )
