"""A process of a launch: what the launcher's environment makes of it, and that it never outlives the launcher.

Under torchrun rank 0 also starts the coordinator, as a child, and ends after it; the local launcher and a cluster
with a coordinator of its own start workers only.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from scpl_dist.launch.coordinator_process import CoordinatorProcess
from scpl_dist.run import network
from scpl_dist.run.config import Config
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.worker import Worker

# Seconds that the coordinator may take to end after rank 0 has.
_COORDINATOR_END_S = 10.0


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def redirect_output(path: Path) -> None:
    """Send what this process and its libraries print to a file, also what C++ prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(
    config: Config,
    run_dir: Path | None,
    control: str | None,
    log_to_folder: bool,
    companion: bool,
    resume: str,
) -> int:
    """Run the worker of this process; ranks come from the launcher's environment.

    Args:
        config: the run.
        run_dir: run folder; None for the coordinator's.
        control: address of the coordinator; None for control.host and control.port.
        log_to_folder: send all output to the run folder's log.
        companion: let rank 0 start the coordinator.
        resume: "never", "auto" or the folder of a checkpoint; for the coordinator that rank 0 starts.

    Returns:
        Exit code.

    Raises:
        ValueError: the launch does not fit the configuration.
    """
    die_with_parent()
    try:
        code, reason = _work(config, run_dir, control, log_to_folder, companion, resume)
    except ValueError as error:
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


def _work(
    config: Config,
    run_dir: Path | None,
    control: str | None,
    log_to_folder: bool,
    companion: bool,
    resume: str,
) -> tuple[int, str]:
    rank, world_size = _ranks(config)
    if log_to_folder and run_dir is not None:
        redirect_output(run_dir / "log" / f"{config.layout.workers[rank].file}.log")
    faulthandler.enable()
    torch.set_num_threads(config.runtime.threads)
    fixed = config.model_copy(update={"control": config.control.fixed()})
    if control is None:
        _check_reachable(fixed, world_size)
        control = f"tcp://{fixed.control.host}:{fixed.control.port}"
    if companion and rank == 0:
        return _lead(fixed, run_dir, resume)
    worker = Worker(config, run_dir, control, rank)
    return worker.run(), worker.reason


def _lead(config: Config, run_dir: Path | None, resume: str) -> tuple[int, str]:
    """Be rank 0 under torchrun: start the coordinator, work, and end after it. Returns code and reason."""
    from scpl_dist.launch.preflight import preflight

    preflight(config)
    folder = RunFolder.create(run_dir, config, resume=resume != "never")
    coordinator = CoordinatorProcess(folder, resume)
    endpoint = coordinator.endpoint()
    code = 1 if endpoint is None else Worker(config, folder.path, endpoint, 0).run()
    ended = coordinator.wait(_COORDINATOR_END_S)
    if ended is None:
        coordinator.kill()
    if folder.read("exit.json") is None:
        folder.fail(1, "the coordinator did not finish the run")
    reason = (folder.read("exit.json") or {}).get("reason", "")
    return ended or code, f"the run ended: {reason}"


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
    """A coordinator on loopback serves one host only."""
    host = config.control.host
    several = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size
    if several and network.is_loopback(network.resolve(host, "control.host")):
        raise ValueError(
            f"control.host = {host!r}: the run has stages on several hosts, which cannot reach this address; set it to "
            f"the name or address of the first host (torchrun has {os.environ.get('MASTER_ADDR', 'none')})"
        )
