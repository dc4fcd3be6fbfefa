"""Where the time of a stage goes.

The training thread says which phase it enters; everything since the last such call belongs to the phase before. The
control thread reads a snapshot for its heartbeats. Plain attributes suffice: one thread writes, and a reader that
sees one phase change early or late is harmless.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from scpl_dist.run.faults import Trap

WAITING = ("receive", "sync")
BLOCKED = "room"
IDLE = "idle"


class PhaseTimer:
    """Phase, position and cumulative seconds of a stage.

    Attributes:
        phase: what the training thread does now.
        step: optimizer updates done before the present item.
        epoch: epoch of the present item.
        micro_batch: micro-batch within the item.
        begun: sequence number of the present item; -1 before the first.
        on_item: called in the training thread when an item begins.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.step = 0
        self.epoch = 0
        self.micro_batch = 0
        self.begun = -1
        self.on_item: Callable[[], None] | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """The phase that begins now."""
        now = time.perf_counter()
        self._seconds[self.phase] += now - self._since
        self._since = now
        self.phase = phase

    def begin(self, item: dict[str, Any]) -> None:
        """The item that begins now."""
        if self.on_item is not None:
            self.on_item()
        self.begun = item["sequence"]
        self.step = item.get("step", self.step)
        self.epoch = item.get("epoch", self.epoch)
        self.micro_batch = 0

    def position(self) -> dict[str, Any]:
        """Phase, step, epoch and micro-batch, for heartbeats and error reports."""
        return {"phase": self.phase, "step": self.step, "epoch": self.epoch, "micro_batch": self.micro_batch}

    def stats(self) -> dict[str, Any]:
        """Cumulative seconds: busy, waiting for input or for replicas, blocked by a full neighbour, and by phase."""
        seconds = dict(self._seconds)
        seconds[self.phase] = seconds.get(self.phase, 0.0) + time.perf_counter() - self._since
        waiting = {phase: seconds.pop(phase) for phase in WAITING if phase in seconds}
        blocked = seconds.pop(BLOCKED, 0.0)
        for outside in ("starting", IDLE):
            seconds.pop(outside, 0.0)
        return {
            "busy": sum(seconds.values()),
            "waiting": sum(waiting.values()),
            "blocked": blocked,
            "phases": {**seconds, **waiting, BLOCKED: blocked},
            "begun": self.begun,
        }


class FaultyTimer(PhaseTimer):
    """A timer whose changes of phase may be the last thing that happens."""

    def __init__(self, trap: Trap) -> None:
        super().__init__()
        self._trap = trap

    def enter(self, phase: str) -> None:
        super().enter(phase)
        self._trap.spring(phase, self.step)
