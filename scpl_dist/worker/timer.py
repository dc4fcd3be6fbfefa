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

from scpl_dist.control.items import Checkpoint, Item, Stop, Train
from scpl_dist.control.messages import Stats
from scpl_dist.run.faults import Trap
from scpl_dist.run.phases import BLAMELESS, BLOCKED, OUTSIDE, TRAINING, WAITING, Phase
from scpl_dist.worker.trace import Trace


class PhaseTimer:
    """Phase, position and cumulative seconds of a stage; with a trap, a change of phase may be the last thing."""

    def __init__(self, trap: Trap | None = None) -> None:
        self._trap = trap
        self.phase = Phase.STARTING
        self.step = 0  # optimizer updates done before the present item
        self.epoch = 0
        self.micro_batch = 0
        self.begun = -1  # sequence number of the present item; -1 before the first
        self.block = -1  # that the training thread works on; -1 between blocks
        self.trace: Trace | None = None  # of the run, where one is recorded
        self.on_item: Callable[[], None] | None = None  # called in the training thread when an item begins
        self._seconds: dict[tuple[Phase, int], float] = defaultdict(float)
        self._entered = (self.phase, self.block)
        self._part = 0  # the micro-batch when the phase began
        self._since = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """The phase that begins now, of the present block."""
        now = time.perf_counter()
        self._seconds[self._entered] += now - self._since
        if self.trace is not None and self.trace.on:
            self.trace.span(*self._entered, self._part, self._since, now)
        self._since = now
        self.phase = phase
        self._entered = (phase, self.block)
        self._part = self.micro_batch
        if self._trap is not None:
            self._trap.spring(phase, self.step)

    def regrouped(self, trap: Trap | None) -> None:
        """A new group begins, whose items are counted from 0."""
        self._trap = trap
        self.begun = -1

    def begin(self, item: Item) -> None:
        if self.on_item is not None:
            self.on_item()
        self.begun = item.sequence
        if isinstance(item, Train | Checkpoint):
            self.step = item.step
        if not isinstance(item, Stop):
            self.epoch = item.epoch
        self.micro_batch = self._part = 0
        if self.trace is not None:
            self.trace.begin(item.sequence, self.step)

    def block_seconds(self) -> dict[int, float]:
        """Cumulative seconds of training by block: forward, loss, backward and update."""
        return _of_blocks(self._passed())

    def stats(self, **counters: Any) -> Stats:
        """The seconds so far, with other counters of the worker."""
        seconds: dict[Phase, float] = defaultdict(float, {BLOCKED: 0.0})
        passed = self._passed()
        for (phase, _), taken in passed.items():
            if phase not in OUTSIDE:
                seconds[phase] += taken
        return Stats(
            busy=sum(spent for phase, spent in seconds.items() if phase not in BLAMELESS),
            waiting=sum(seconds[phase] for phase in WAITING if phase in seconds),
            blocked=seconds[BLOCKED],
            phases=dict(seconds),
            blocks={str(block): taken for block, taken in _of_blocks(passed).items()},
            begun=self.begun,
            **counters,
        )

    def _passed(self) -> dict[tuple[Phase, int], float]:
        seconds = dict(self._seconds)
        seconds[self._entered] = seconds.get(self._entered, 0.0) + time.perf_counter() - self._since
        return seconds


def _of_blocks(passed: dict[tuple[Phase, int], float]) -> dict[int, float]:
    blocks: dict[int, float] = defaultdict(float)
    for (phase, block), taken in passed.items():
        if block >= 0 and phase in TRAINING:
            blocks[block] += taken
    return blocks
