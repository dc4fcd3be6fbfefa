"""The table of a run that goes on: a row for each worker, and a line about the whole.

The same for the live table and for ``scpl-dist top``. Shares and rates are those of the last seconds, not since the
start: they answer "what is slow now". Only the first look knows no earlier one, and shows those since the start.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from scpl_dist.coordinator.status import Status, shares

SPAN_S = 5.0
TIMES = ("busy", "waiting", "blocked")


class StatusTable:
    def __init__(self) -> None:
        self._seen: deque[Status] = deque()

    def draw(self, status: Status) -> Group:
        if self._seen and self._seen[-1]["generation"] != status["generation"]:
            self._seen.clear()  # the run was started again, and everything is counted anew
        self._seen.append(status)
        while len(self._seen) > 2 and status["now"] - self._seen[1]["now"] >= SPAN_S:
            self._seen.popleft()
        old = self._seen[0] if len(self._seen) > 1 else None
        several_hosts = len({worker["host"] for worker in status["workers"]} - {None}) > 1
        table = Table(box=None, pad_edge=False)
        for heading in ("stage", "step", "loss", *TIMES, "queue", "MB/s sent"):
            table.add_column(heading, justify="right")
        for heading in ("phase", "host") if several_hosts else ("phase",):
            table.add_column(heading)
        for index, worker in enumerate(status["workers"]):
            if worker["host"] is None:
                table.add_row(worker["name"], *[""] * 7, "not here yet")
                continue
            before = old["workers"][index] if old is not None else {}
            passed = status["now"] - old["now"] if old is not None else 0.0
            cells = _cells(worker, before, passed)
            table.add_row(*map(Text, cells if several_hosts else cells[:-1]))
        return Group(table, Text(line(status)))


def _cells(worker: dict[str, Any], before: dict[str, Any], passed: float) -> list[str]:
    def grown(name: str) -> float:
        return max(0.0, float(worker[name] - before.get(name, 0)))

    loss = f"{sum(worker['losses'].values()):.4f}" if worker["losses"] else ""
    parts = shares(*map(grown, TIMES))
    times = [f"{part:.0%}" for part in parts] if parts is not None else [""] * 3
    sent = f"{grown('bytes_sent') / passed / 1e6:.2f}" if passed else ""
    row = [worker["name"], str(worker["step"]), loss, *times, str(worker["queue"]), sent]
    return [*row, worker["phase"], worker["host"]]


def line(status: Status) -> str:
    """How far the run is, and how well it does."""
    if status["seconds"] is None:
        return status["unready"] or ""
    parts = [status["method"], f"epoch {status['epoch'] + 1}/{status['epochs']}"]
    parts.append(f"step {status['step']}/{status['steps']}")
    if status["accuracies"]:
        latest = {split: value for split, value in status["accuracies"][-1].items() if split != "epoch"}
        parts += [f"{split} accuracy {accuracy:.4f}" for split, accuracy in latest.items()]
    if status["samples_per_second"] is not None:
        parts.append(f"{status['samples_per_second']:.0f} samples/s")
    if status["seconds_left"] is not None:
        parts.append(f"{duration(status['seconds_left'])} left")
    return ", ".join([*parts, f"{status['checkpoints']} checkpoints"])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 0:01:30."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
