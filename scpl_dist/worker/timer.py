"""Where the time of a stage goes.

The training thread says which phase it enters; everything since the last such call belongs to the phase before. The
control thread reads a snapshot for its heartbeats. Plain attributes suffice: one thread writes, and a reader that
sees one phase change early or late is harmless.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from scpl_dist.control.items import Checkpoint, Item, Stop, Train
from scpl_dist.control.messages import Stats
from scpl_dist.run.faults import Trap
from scpl_dist.run.phases import BLAMELESS, BLOCKED, OUTSIDE, WAITING, Phase


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
        self.phase = Phase.STARTING
        self.step = 0
        self.epoch = 0
        self.micro_batch = 0
        self.begun = -1
        self.on_item: Callable[[], None] | None = None
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._since = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """The phase that begins now."""
        now = time.perf_counter()
        self._seconds[self.phase] += now - self._since
        self._since = now
        self.phase = phase

    def begin(self, item: Item) -> None:
        """The item that begins now."""
        if self.on_item is not None:
            self.on_item()
        self.begun = item.sequence
        if isinstance(item, Train | Checkpoint):
            self.step = item.step
        if not isinstance(item, Stop):
            self.epoch = item.epoch
        self.micro_batch = 0

    def stats(self, **counters: int) -> Stats:
        """The seconds so far, with other counters of the worker."""
        seconds = {BLOCKED: 0.0, **self._seconds}
        seconds[self.phase] = seconds.get(self.phase, 0.0) + time.perf_counter() - self._since
        for phase in OUTSIDE:
            seconds.pop(phase, None)
        return Stats(
            busy=sum(spent for phase, spent in seconds.items() if phase not in BLAMELESS),
            waiting=sum(seconds.get(phase, 0.0) for phase in WAITING),
            blocked=seconds[BLOCKED],
            phases=seconds,
            begun=self.begun,
            **counters,
        )


class FaultyTimer(PhaseTimer):
    """A timer whose changes of phase may be the last thing that happens."""

    def __init__(self, trap: Trap) -> None:
        super().__init__()
        self._trap = trap

    def enter(self, phase: Phase) -> None:
        """See `PhaseTimer.enter`."""
        super().enter(phase)
        self._trap.spring(phase, self.step)
