"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere.

Only the coordinator draws, so nothing interleaves. The shares of a stage's time are those of the last seconds, not
since the start: they answer "what is slow now". Everything goes to standard error; the final summary, which other
programs may want, goes to standard output.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scpl_dist.control.messages import Stats
from scpl_dist.coordinator.events import Say
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run.failures import Failure, Outcome

SPAN_S = 5.0
TAIL_LINES = 15
CONTROL = re.compile(r"[^\n\t -~\u00a0-\uffff]")
"""Characters that could steer a terminal; a message from the network must not."""


class Shares:
    """Busy, waiting and blocked shares of a stage's time over the last seconds."""

    def __init__(self, span_s: float = SPAN_S) -> None:
        self._span_s = span_s
        self._seen: deque[tuple[float, float, float, float]] = deque()

    def update(self, stats: Stats, now: float) -> tuple[float, float, float] | None:
        """The shares, which sum to 1, or None as long as nothing was counted in that time."""
        self._seen.append((now, stats.busy, stats.waiting, stats.blocked))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._span_s:
            self._seen.popleft()
        old = self._seen[0]
        parts = [max(0.0, new - before) for new, before in zip(self._seen[-1][1:], old[1:], strict=True)]
        total = sum(parts)
        return (parts[0] / total, parts[1] / total, parts[2] / total) if total > 0 else None


class Progress:
    """Draws the state of a run.

    Args:
        coordinator: what is drawn.
        stream: where to; a live table if it is a terminal.
    """

    def __init__(self, coordinator: Coordinator, stream: TextIO | None = None) -> None:
        self._coordinator = coordinator
        self._console = Console(file=stream or sys.stderr, stderr=stream is None, highlight=False)
        self._shares: dict[int, Shares] = {}
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def say(self, command: Say) -> None:
        """Show a line; on a terminal the table has what a progress line would tell."""
        if command.kind == "warning":
            self._line(f"warning: {command.text}")
        elif self._live is None:
            self._line(command.text)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, now: float) -> None:
        """Draw the table anew; `now` is monotonic seconds."""
        if self._live is not None:
            self._live.update(self.picture(now), refresh=True)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def picture(self, now: float) -> Group:
        """A row for each worker, and a line about the whole run."""
        table = Table(box=None, pad_edge=False)
        for name in ("stage", "step", "loss", "busy", "waiting", "blocked", "queue", "phase"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for worker_id in sorted(
            self._coordinator.layout.workers, key=lambda worker_id: (worker_id.stage, worker_id.replica)
        ):
            member = self._coordinator.members.get(worker_id.rank)
            if member is None:
                table.add_row(worker_id.label, "", "", "", "", "", "", "not here yet")
                continue
            shares = self._shares.setdefault(worker_id.rank, Shares()).update(member.stats, now)
            cells = [f"{share:.0%}" for share in shares] if shares else ["", "", ""]
            loss = f"{sum(member.losses.values()):.4f}" if member.losses else ""
            row = [worker_id.label, str(member.step), loss, *cells, str(member.stats.queue), member.phase]
            table.add_row(*row)
        return Group(table, Text(self.status(now)))

    def status(self, now: float) -> str:
        """Epoch, step, accuracy, speed and time left, as far as they are known."""
        coordinator = self._coordinator
        flow = coordinator.flow
        if flow is None or flow.begun is None:
            return coordinator.unready(now) or ""
        sequence, results = flow.sequence, flow.results
        last = coordinator.ordered()[-1]
        done = results.steps_done
        parts = [f"epoch {last.epoch + 1}/{coordinator.config.run.epochs}", f"step {done}/{sequence.steps}"]
        if results.accuracies:
            found = results.accuracies[max(results.accuracies)]
            parts += [f"{split} accuracy {accuracy:.4f}" for split, accuracy in found.items()]
        speed = results.samples_per_second
        if speed is not None and coordinator.data is not None:
            parts.append(f"{speed:.0f} samples/s")
            samples = (sequence.steps - done) * coordinator.data.sizes["train"] / sequence.steps_per_epoch
            parts.append(f"{_duration(samples / speed)} left")
        return ", ".join(parts)


def failure_text(failure: Failure, log: Path, name: str | None) -> str:
    """One block about a failure, its root cause last; `name` is that of the worker's log in the folder of logs."""
    lines = ["", "The run failed."]
    file = log / f"{name}.log"
    said = failure.traceback or _tail(file)
    if said:
        lines += ["", said.rstrip(), ""]
    pairs: list[tuple[str, Any]] = [
        ("stage", failure.stage),
        ("replica", failure.replica or None),
        ("host", failure.host),
        ("rank", failure.rank),
        ("pid", failure.pid),
        ("phase", failure.phase),
        ("step", failure.step),
        ("micro-batch", failure.micro_batch),
    ]
    where = ", ".join(f"{name} {value}" for name, value in pairs if value is not None)
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
            lines = stream.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return ""
    return "\n".join([f"The last lines of {file}:", *lines]) if lines else ""


def summary(outcome: Outcome, folder: Path) -> str:
    """The last words of a run that did not fail."""
    result = outcome.result
    if result is None:
        return f"{outcome.reason}; go on with --resume auto --run-dir {folder}"
    lines = [
        f"{result['method']}, {result['stages']} stages: {result['steps']} steps in {result['wall_seconds']:.1f} s"
    ]
    if result["samples_per_second"]:
        lines[0] += f", {result['samples_per_second']:.0f} samples/s"
    if result["accuracy_last"] is not None:
        lines.append(f"test accuracy {result['accuracy_last']:.4f}")
        if result["accuracy_best"] is not None:
            best = f", {result['accuracy_best']:.4f} in the best epoch ({result['best_epoch']}"
            lines[-1] += f"{best}, by {result['selected_by']} accuracy)"
    lines.append(f"run folder {folder}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
