"""The worker of one rank, under any launcher.

Under torchrun rank 0 also starts the coordinator, as a child, and ends after it; the local launcher and a cluster
with a coordinator of its own start workers only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import time
from pathlib import Path

import psutil
import torch

from scpl_dist.launch.coordinator_process import CoordinatorProcess
from scpl_dist.launch.preflight import preflight
from scpl_dist.launch.process import ended, kill, spawn
from scpl_dist.run import config as configuration
from scpl_dist.run import network, open_files
from scpl_dist.run.config import Config
from scpl_dist.run.descent import die_with_parent
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.resume import begin
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.worker import Worker


def local(run_dir: str, control: str) -> int:
    """Be a worker of the local launcher; returns the exit code."""
    config = configuration.load(Path(run_dir, "config.toml"))
    return _work(config, Path(run_dir), control, _ranks(config)[0])[0]


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
        if companion and rank == 0:
            code, reason = _lead(fixed, run_dir, resume)
        else:
            code, reason = _work(config, run_dir, control, rank)
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


def _work(config: Config, run_dir: Path | None, control: str, rank: int) -> tuple[int, str]:
    faulthandler.enable()
    torch.set_num_threads(config.runtime.threads)
    worker = Worker(config, run_dir, control, rank)
    return worker.run(), worker.reason


def _lead(config: Config, run_dir: Path | None, resume: str) -> tuple[int, str]:
    """Be rank 0 under torchrun: start the coordinator, work, and end after it."""
    restore, manifest, seen = begin(run_dir, resume, config)
    labels: dict[str, list[int]] = {}
    preflight(config, position=manifest.get("position"), labels=labels.update)
    folder = RunFolder.create(run_dir, config, resume=resume != "never")
    with folder.taken(config, labels, seen):
        coordinator = CoordinatorProcess(folder, spawn, restore)
        process = coordinator.process
        endpoint = coordinator.endpoint(lambda: ended(process) is None)
        code = 1 if endpoint is None else _work(config, folder.path, endpoint, 0)[0]
        try:
            code = process.wait(10) or code
        except psutil.TimeoutExpired:
            kill([process])
        coordinator.close()
        if folder.read("exit.json") is None:
            folder.fail(1, "the coordinator did not finish the run")
    reason = (folder.read("exit.json") or {}).get("reason", "")
    return code, f"the run ended: {reason}"


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
    several = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size
    if several and network.is_loopback(network.resolve(host, "control.host")):  # which serves one host only
        raise ValueError(
            f"control.host = {host!r}: the run has stages on several hosts, which cannot reach this address; set it to "
            f"the name or address of the first host (torchrun has {os.environ.get('MASTER_ADDR', 'none')})"
        )
