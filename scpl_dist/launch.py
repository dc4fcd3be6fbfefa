"""The local launcher: starts a run on this machine, and starts it again when something from outside ended it.

    scpl-dist train --- preflight: configuration, data, model, ports, run folder (exit 2 before anything starts)
        '-- Group 1 (coordinator and workers) --killed, hung--> Group 2, from the last good checkpoint --> ...

The launcher decides nothing about training. It passes signals on, makes sure that everything ends, and decides with
`scpl_dist.restarts` whether a failure is final.
"""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from scpl_dist.agenda import Agenda
from scpl_dist.checkpoint import steps
from scpl_dist.config import Config
from scpl_dist.group import Event, Group, Signalled
from scpl_dist.network import resolve
from scpl_dist.restarts import End, Restarts
from scpl_dist.run_folder import RunFolder

if TYPE_CHECKING:
    from scpl_dist.data import DataSource

__all__ = ["launch", "preflight"]


def preflight(config: Config, absent: Callable[[str], None] | None = None) -> Any:
    """Find the user's mistakes before any process starts, and decide what is decided once for all processes.

    Args:
        config: the run.
        absent: called with the reason if the files of a published data set cannot be used; everything else is checked
            then. None makes that an error.

    Returns:
        The `scpl_dist.assembly.Assembly` of the run. Its configuration is the one to run: the counts of a measured
        partition are in it.

    Raises:
        ValueError: with the key, the value and the fix.
    """
    from scpl_dist import data
    from scpl_dist.assembly import Assembly

    try:
        source = data.resolve(config)
    except ValueError as error:
        known = data.outline(config)
        if absent is None or known is None or config.pipeline.partition == "measured":
            raise
        absent(str(error))
        return Assembly.plan(config, *known)
    size = source.sizes["train"]
    if config.data.batch_size > size:
        raise ValueError(
            f"data.batch_size = {config.data.batch_size}: the training set of {config.data.name!r} has {size} "
            f"samples; use at most {size}"
        )
    Agenda(config, source.sizes)  # raises if replicas cannot share the batches
    if config.pipeline.partition == "measured":
        config = _measured(config, source)
    assembly = Assembly.plan(config, source.classes, source.example())
    if config.runtime.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError('runtime.device = "cuda": torch sees no GPU here; use "auto" or "cpu"')
    _check_port("metrics", config.metrics.host, config.metrics.port)
    _check_port("control", config.control.host, config.control.port)
    return assembly


def _measured(config: Config, source: DataSource) -> Config:
    """The configuration with the block counts that measuring gives."""
    from scpl_dist import costs
    from scpl_dist.assembly import Assembly

    pipeline = config.pipeline.model_copy(update={"partition": "uniform"})
    plan = Assembly.plan(config.model_copy(update={"pipeline": pipeline}), source.classes, source.example())
    return config.model_copy(
        update={"pipeline": pipeline.model_copy(update={"partition": costs.counts(plan, source)})}
    )


def launch(config: Config, folder: RunFolder, resume: str = "never") -> int:
    """Run to the end, with restarts.

    Args:
        config: the run, checked by `preflight`.
        folder: an opened run folder.
        resume: "never", "auto" or the folder of a checkpoint.

    Returns:
        The exit code of the contract: 0 done, 1 failed, 2 configuration, 130 or 143 stopped.

    Raises:
        ValueError: another run is in progress in the folder.
    """
    with folder.locked():
        return _launch(config, folder, resume)


def _launch(config: Config, folder: RunFolder, resume: str) -> int:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    signals: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        events.put(Signalled(number))

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        restarts = Restarts(config.runtime.max_restarts)
        while True:
            group = Group(config, folder, resume, restarts.causes, events, may_restart=restarts.left > 0)
            end = group.run()
            if end.code != 1 or signals:
                return end.code
            refusal = restarts.refusal(end)
            if refusal is not None:
                _say_final(end, refusal, config)
                return end.code
            resume = "auto" if steps(folder.path) else resume
            _note_restart(end, restarts, folder, resume)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _note_restart(end: End, restarts: Restarts, folder: RunFolder, resume: str) -> None:
    """Say it on the screen and in ``metrics.jsonl``, which nobody else writes at this moment."""
    number = len(restarts.causes)
    where = (
        "the last good checkpoint" if resume != "never" else "the beginning, as there is no checkpoint yet"
    )
    print(f"restart {number} of {restarts.limit} from {where}: {end.reason}", file=sys.stderr, flush=True)
    row = {"event": "restart", "number": number, "cause": end.cause, "reason": end.reason, "stage": end.stage}
    folder.append(row | {"time": time.time()})


def _say_final(end: End, refusal: str, config: Config) -> None:
    """Repeat the cause where restarts were allowed: it must be the last thing on the screen."""
    if config.runtime.max_restarts:
        print(f"scpl-dist: {refusal}\n  cause:      {end.reason}", file=sys.stderr, flush=True)


def _check_port(section: str, host: str, port: int) -> None:
    if port == 0:
        return
    address = resolve(host, f"{section}.host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(
                f"{section}.port = {port}: cannot listen on {host}:{port} ({error.strerror}); choose another one, "
                f"or -o {section}.port=0 for any free one"
            ) from None
