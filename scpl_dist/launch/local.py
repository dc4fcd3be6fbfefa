"""The local launcher: starts a run on this machine, and starts it again when something from outside ended it.

    scpl-dist train --- preflight: configuration, data, model, ports, run folder (exit 2 before anything starts)
        '-- Group 1 (coordinator and workers) --killed, hung--> Group 2, from the last good checkpoint --> ...

The launcher decides nothing about training. It passes signals on, makes sure that everything ends, and decides with
`scpl_dist.launch.restarts` whether a failure is final.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from scpl_dist.launch.attempt import Attempt, Event, Signalled
from scpl_dist.launch.restarts import End, Restarts
from scpl_dist.run.config import Config
from scpl_dist.storage.checkpoints import steps
from scpl_dist.storage.run_folder import RunFolder

if TYPE_CHECKING:
    pass


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
            group = Attempt(config, folder, resume, restarts.causes, events, may_restart=restarts.left > 0)
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
    folder.metrics.append(row | {"time": time.time()})
    folder.metrics.close()


def _say_final(end: End, refusal: str, config: Config) -> None:
    """Repeat the cause where restarts were allowed: it must be the last thing on the screen."""
    if config.runtime.max_restarts:
        print(f"scpl-dist: {refusal}\n  cause:      {end.reason}", file=sys.stderr, flush=True)
