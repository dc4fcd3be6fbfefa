"""The local launcher: runs on this machine, and starts again when something from outside ended a run.

    scpl-dist train --- preflight: configuration, data, model, ports (exit 2 before anything starts)
        '-- Attempt 1 (coordinator and workers) --killed, hung--> Attempt 2, from the last good checkpoint --> ...

All processes are forked from one server, which has imported torch (`scpl_dist.launch.server`). The launcher decides
nothing about training. It passes signals on, makes sure that everything ends, and decides with
`scpl_dist.launch.restarts` whether a failure is final.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from scpl_dist.launch.attempt import Attempt, Ended, Event, Signalled
from scpl_dist.launch.child import Order
from scpl_dist.launch.children import Children
from scpl_dist.launch.restarts import End, Restarts
from scpl_dist.run.config import Config
from scpl_dist.run.errors import PreflightError
from scpl_dist.run.network import VARIABLES, loopback
from scpl_dist.storage.checkpoints import steps
from scpl_dist.storage.run_folder import RunFolder


def train(config: Config, run_dir: str | Path | None, resume: str = "never") -> tuple[int, RunFolder]:
    """Check a run and take it to its end, with restarts.

    Args:
        config: the run.
        run_dir: run folder; None makes one.
        resume: "never", "auto" or the folder of a checkpoint.

    Returns:
        The exit code of the contract: 0 done, 1 failed, 2 configuration, 130 or 143 stopped; and the run folder.

    Raises:
        ValueError: something cannot be used, or another run is in progress in the folder; nothing has begun.
    """
    return Launcher(config).train(run_dir, resume)


class Launcher:
    """One run on this machine."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._signals: list[int] = []
        self._children = self._start_server()

    def train(self, run_dir: str | Path | None, resume: str) -> tuple[int, RunFolder]:
        """See `train`."""
        try:
            self._config = self._checked()
            folder = RunFolder.create(run_dir, self._config, resume=resume != "never")
            with folder.locked(), _handled(self._on_signal):
                return self._launch(folder, resume), folder
        finally:
            self._children.close()

    def _start_server(self) -> Children:
        threads = str(self._config.runtime.threads)
        interface = self._config.runtime.interface or loopback()
        environment = dict.fromkeys(VARIABLES, interface)
        environment["OMP_NUM_THREADS"] = threads
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a peer's ordinary end is worth no warning
        return Children("scpl-dist: server", environment, self._on_exit)

    def _on_exit(self, pid: int, code: int) -> None:
        self._events.put(Ended(pid, code))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._events.put(Signalled(number))

    def _checked(self) -> Config:
        """The configuration to run, checked in a process of its own: nothing of data and model stays in this one."""
        entry, arguments = (
            "scpl_dist.launch.preflight:answer",
            {"config": self._config.model_dump(mode="json")},
        )
        answer = self._children.call(Order(entry, arguments, title="scpl-dist: preflight"))
        if answer is None:
            raise PreflightError("the check of the run was killed, perhaps because the memory was full")
        if "mistake" in answer:
            raise ValueError(answer["mistake"])
        if "raised" in answer:
            raise PreflightError(answer["raised"])
        return Config.model_validate(answer["config"])

    def _launch(self, folder: RunFolder, resume: str) -> int:
        config = self._config
        restarts = Restarts(config.runtime.max_restarts)
        while True:
            may_restart = restarts.left > 0
            attempt = Attempt(
                config, folder, resume, restarts.causes, self._children, self._events, may_restart
            )
            end = attempt.run()
            if end.code != 1 or self._signals:
                return end.code
            refusal = restarts.refusal(end)
            if refusal is not None:
                _say_final(end, refusal, config)
                return end.code
            resume = "auto" if steps(folder.path) else resume
            _note_restart(end, restarts, folder, resume)
            if not self._children.alive:
                self._children = self._start_server()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that ask for a stop, if this is the thread that can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


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
