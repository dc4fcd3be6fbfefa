"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere, one every few seconds.

Only the coordinator draws, so nothing interleaves. Everything goes to standard error; the final summary, which other
programs may want, goes to standard output.
"""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from scpl_dist.coordinator.events import Say
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.status import snapshot
from scpl_dist.coordinator.table import StatusTable, duration, line
from scpl_dist.run.failures import Failure, Outcome

# Characters that could steer a terminal; a message from the network must not.
CONTROL = re.compile(r"[^\n\t -~\u00a0-\uffff]")


SILENCE_S = 10.0  # without a line, after which one says how far the run is
# Between the lines of two epochs, or two drawings of a table, each of which takes half a ms a stage.
APART_S = 1.0


class Progress:
    def __init__(self, coordinator: Coordinator, stream: TextIO | None = None) -> None:
        self._coordinator = coordinator
        file = stream or sys.stderr
        # Whoever forces colours, as notebooks and CI do, gets no table that moves a cursor where there is none.
        terminal = None if file.isatty() else False
        self._console = Console(file=file, stderr=stream is None, highlight=False, force_terminal=terminal)
        self._table = StatusTable()
        self._live: Live | None = None
        self._said: float | None = None  # when the last line came, on the clock of `update`
        self._epoch: str | None = None  # the line of the newest epoch, until it is said
        self._epoch_said = self._drawn = -math.inf
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def say(self, command: Say) -> None:
        """Show a line; on a terminal the table has what a progress line would tell."""
        if command.kind == "epoch":
            self._epoch = command.text
            return
        warned = command.kind == "warning"
        if warned or self._live is None:
            text = f"warning: {command.text}" if warned else command.text
            self._console.print(text, markup=False, soft_wrap=True)
            self._said = None

    def update(self, now: float) -> None:
        if self._live is not None:
            if now - self._drawn >= APART_S:
                self._live.update(self._table.draw(snapshot(self._coordinator, now)), refresh=True)
                self._drawn = now
            return
        if self._epoch is not None and now - self._epoch_said >= APART_S:
            left = snapshot(self._coordinator, now)["seconds_left"]
            self._say_epoch(f", {duration(left)} left" if left else "")
            self._epoch_said = now
        self._said = now if self._said is None else self._said
        if now - self._said >= SILENCE_S:
            status = snapshot(self._coordinator, now)
            losses = status["workers"][-1]["losses"]  # of the blocks of the last stage
            loss = f", loss {sum(losses.values()):.4f}" if losses else ""
            self.say(Say(f"{time.strftime('%H:%M:%S')} {line(status)}{loss}"))

    def _say_epoch(self, left: str = "") -> None:
        if self._epoch is not None:
            self.say(Say(self._epoch + left))
        self._epoch = None

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._say_epoch()


def failure_text(failure: Failure, log: Path, name: str | None) -> str:
    """One block about a failure, its root cause last; `name` is that of the worker's log in the folder of logs."""
    lines = ["", "The run failed."]
    file = log / f"{name}.log"
    said = failure.traceback or _tail(file)
    if said:
        lines += ["", said.rstrip(), ""]
    keys = ("stage", "host", "rank", "pid", "phase", "step", "micro_batch")
    known = {key: getattr(failure, key) for key in keys}
    if name is not None:
        known["stage"] = name.removeprefix("stage")  # with its replica, where the stage has several workers
    where = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in known.items() if value is not None)
    if where:
        lines.append(f"  where:      {where}")
    lines.append(f"  log:        {file if file.exists() else log}")
    lines += [f"  what to do: {failure.advice}", f"  cause:      {failure.message}"]
    return CONTROL.sub("?", "\n".join(lines))


def _tail(file: Path) -> str:
    """The last lines of a stage's log, which is all that a killed worker leaves."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 4096))
            lines = stream.read().decode("utf-8", "replace").splitlines()[-15:]
    except OSError:
        return ""
    return "\n".join([f"The last lines of {file}:", *lines]) if lines else ""


def summary(outcome: Outcome, folder: Path) -> str:
    result = outcome.result
    if result is None:
        again = f"scpl-dist train --resume auto --run-dir {folder}"
        return f"{outcome.reason}; go on with: {again}, or on a cluster with these options of what started it"
    steps = f"{result['steps']} steps in {result['wall_seconds']:.1f} s"
    lines = [f"{result['method']}, {result['stages']} stages: {steps}"]
    if result["samples_per_second"]:
        lines[0] += f", {result['samples_per_second']:.0f} samples/s"
    if result["stopped_early"]:
        lines.append(f"stopped early, after epoch {result['epochs']}: run.patience is exhausted")
    if result["accuracy_last"] is not None:
        lines.append(f"test accuracy {result['accuracy_last']:.4f} after the last epoch")
        if result["accuracy_best"] is not None:
            best, epoch = (
                result["accuracy_best"],
                result["best_epoch"] + 1,
            )  # epochs count from 1 on the screen
            lines[-1] += (
                f", {best:.4f} after epoch {epoch}, the best by {result['selected_by']} {result['watch']}"
            )
    lines.append(f"run folder {folder}; everything about it: scpl-dist report {folder}")
    return "\n".join(lines)
