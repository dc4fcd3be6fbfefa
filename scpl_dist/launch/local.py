"""The local launcher: runs on this machine, and starts again when something from outside ended a run.

    scpl-dist train --- preflight: configuration, data, model, ports (exit 2 before anything starts)
        '-- Attempt 1 (coordinator and workers) --killed, hung--> Attempt 2, from the last good checkpoint --> ...

The launcher imports torch once, and all its processes are forked from it; beyond that it has nothing to do with
torch and decides nothing about training. It passes signals on, makes sure that everything ends, and decides with
`scpl_dist.coordinator.restarts` whether a failure is final.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from scpl_dist.coordinator.restarts import End, Restarts
from scpl_dist.launch.attempt import Attempt
from scpl_dist.launch.coordinator_process import conclude
from scpl_dist.launch.process import call, spawn, tell
from scpl_dist.run import open_files
from scpl_dist.run.config import Config
from scpl_dist.run.errors import PreflightError
from scpl_dist.run.failures import MEANING, Cause
from scpl_dist.run.network import VARIABLES, loopback
from scpl_dist.storage.checkpoints import CheckpointError, steps
from scpl_dist.storage.resume import begin
from scpl_dist.storage.run_folder import RunFolder

_FOR_CHECK = ("scpl_dist.launch.preflight",)
# Every optimizer imports torch._dynamo at its first step, which takes as long as torch itself.
_FOR_RUN = (
    "torch.distributed.rpc",
    "torch._dynamo",
    "scpl_dist.coordinator.service",
    "scpl_dist.launch.rank",
)


def train(
    config: Config,
    run_dir: Path | None,
    resume: str = "never",
    begun: Callable[[RunFolder], None] = lambda folder: None,
) -> tuple[int, RunFolder]:
    """Check a run and take it to its end, with restarts, in a process that does nothing else.

    `run_dir` None makes a folder; `resume` is "never", "auto" or the folder of a checkpoint. `begun` is called with the
    folder when all is checked. Returns the run folder and
    the exit code of the contract: 0 done, 1 failed, 2 configuration, 130 or 143 stopped.

    Raises:
        ValueError: something cannot be used, or another run is in progress in the folder; nothing has begun.
        CheckpointError: there is no checkpoint to go on from; nothing has begun.
    """
    restore, manifest, seen = begin(run_dir, resume, config)
    _set_environment(config)
    open_files.raise_limit()
    _import(_FOR_CHECK)
    # In a process of its own: nothing of data and model stays in this one.
    arguments = {"config": config.model_dump(mode="json"), "position": manifest.get("position")}
    checked = call(
        "scpl_dist.launch.preflight:checked", arguments, "scpl-dist: preflight", meanwhile=_importing
    )
    if checked is None:
        raise PreflightError("the check of the run was killed, perhaps because the memory was full")
    config = Config.model_validate(checked["config"])
    folder = RunFolder.create(run_dir, config, resume=resume != "never")
    begun(folder)
    signals: list[int] = []
    with folder.taken(config, checked["labels"], seen):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        return _launch(config, folder, resume, restore, signals), folder


def _set_environment(config: Config) -> None:
    """Variables that all processes inherit, and what can be imported."""
    os.environ.update(dict.fromkeys(VARIABLES, config.runtime.interface or loopback()))
    os.environ["OMP_NUM_THREADS"] = str(config.runtime.threads)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a peer's ordinary end is worth no warning
    # numpy's linear algebra would start threads when it is imported, and a fork would not be safe.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _import(names: Sequence[str]) -> None:
    """Import modules for all processes that are forked from this one."""
    if not sys.platform.startswith("linux"):
        return
    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # it stays, and its memory stays shared: nobody needs to look for garbage there
    gc.enable()


@contextmanager
def _importing(preflight: psutil.Process) -> Iterator[None]:
    """While the check runs on another core."""
    _import(_FOR_RUN)
    yield


def _launch(config: Config, folder: RunFolder, resume: str, restore: str, signals: list[int]) -> int:
    restarts = Restarts(config.runtime.max_restarts)
    while True:
        end = Attempt(config, folder, restore, restarts.causes, restarts.left > 0, signals).run()
        if end.code != 1 or signals:
            return end.code
        refusal = restarts.refusal(end)
        if refusal is not None:
            if config.runtime.max_restarts:  # the cause must be the last thing on the screen
                print(f"scpl-dist: {refusal}\n  cause:      {end.reason}", file=sys.stderr, flush=True)
            return end.code
        resume = "auto" if steps(folder.path) else resume
        try:
            restore = begin(folder.path, resume, config).restore
        except CheckpointError as error:
            conclude(folder, 1, str(error), Cause.CHECKPOINT)
            print(f"scpl-dist: not started again: {error}", file=sys.stderr, flush=True)
            return 1
        refusal = note_restart(end, restarts, folder, restore)
        if refusal is not None:
            print(f"scpl-dist: {refusal}", file=sys.stderr, flush=True)
            return end.code


def note_restart(end: End, restarts: Restarts, folder: RunFolder, restore: str) -> str | None:
    """Say it in ``metrics.jsonl``, which nobody else writes at this moment, and on the screen.

    Where that cannot be written, a start is of no use: then the answer is why, with the cause of the end.
    """
    number = len(restarts.causes)
    row = {"event": "restart", "number": number, "cause": end.cause, "reason": end.reason, "stage": end.stage}
    try:
        folder.metrics.append(row | {"step": end.step, "time": time.time()})
    except OSError as error:
        text = f"{folder.metrics.path} cannot be written ({error.strerror}): {MEANING[Cause.DISK].advice}"
        return f"not started again: {text}\n  cause:      {end.reason}"
    finally:
        folder.metrics.close()
    where = "the last good checkpoint" if restore else "the beginning, as there is no checkpoint yet"
    print(f"restart {number} of {restarts.limit} from {where}: {end.reason}", file=sys.stderr, flush=True)
    return None


def train_apart(
    config: Config, run_dir: str | Path | None, begun: Callable[[Path], None]
) -> tuple[int, RunFolder] | None:
    """`train` for a program with threads, a GPU and plans of its own: the launcher is a child of it.

    `begun` is called with the run folder when all is checked. None if the launcher was killed.
    """
    arguments = {"config": config.model_dump(mode="json"), "run_dir": run_dir and str(run_dir)}
    entry = "scpl_dist.launch.local:_train_here"
    answer = call(
        entry, arguments, "scpl-dist: launcher", spawn, _signals_passed_on, lambda told: begun(Path(told))
    )
    return answer and (answer["code"], RunFolder(Path(answer["run_dir"])))


def _train_here(config: dict[str, Any], run_dir: str | None) -> dict[str, Any]:
    path = None if run_dir is None else Path(run_dir)
    code, folder = train(
        Config.model_validate(config), path, begun=lambda folder: tell(str(folder.path.absolute()))
    )
    return {"code": code, "run_dir": str(folder.path)}


@contextmanager
def _signals_passed_on(launcher: psutil.Process) -> Iterator[None]:
    """Those that ask for a stop, if this is the thread that can handle them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: launcher.send_signal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
