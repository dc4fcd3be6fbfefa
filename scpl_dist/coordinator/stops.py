"""Signals that a run is to be stopped by, and how they are answered.

before the first step, or between two groups     stopped at once: nothing is lost
of some workers only, then                       a moment later: their death would be the better reason
while all go on                                  a checkpoint, then the end, unless another worker has died: whoever
                                                 started the workers ends the others then, and starts all again
a second one of the same source                  at once
"""

from __future__ import annotations

import math

from scpl_dist.coordinator.watchdog import STOP_GRACE_S, signal_name


class Stops:
    def __init__(self) -> None:
        self._signalled: dict[str, int] = {}  # by who got it
        self._deadline = math.inf

    @property
    def any(self) -> bool:
        return bool(self._signalled)

    @property
    def sources(self) -> int:
        return len(self._signalled)

    @property
    def number(self) -> int:
        """The signal that came first."""
        return next(iter(self._signalled.values()))

    @property
    def name(self) -> str:
        return signal_name(self.number)

    def add(self, source: str, number: int) -> bool:
        """Whether it is the first one of this source."""
        first = source not in self._signalled
        self._signalled.setdefault(source, number)
        return first

    def wait(self, now: float) -> None:
        """Some workers ask for it: whoever started them ends the others when one has died."""
        self._deadline = min(self._deadline, now + STOP_GRACE_S)

    def asked(self, source: str) -> bool:
        return source in self._signalled

    def came_of(self, worker: str, now: float) -> bool:
        """Whether the death of this worker may be why others are to stop: only others asked for it, a moment ago."""
        others = all(source.startswith("stage ") for source in self._signalled)
        return others and not self.asked(worker) and now < self._deadline

    def due(self, now: float) -> bool:
        return now >= self._deadline
