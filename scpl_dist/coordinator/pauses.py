"""Times in which the coordinator itself was stopped: nobody listened, so nobody can be blamed for silence."""

from __future__ import annotations

import math

from scpl_dist.coordinator.watchdog import GRACE_S, PAUSE_S


class Pauses:
    """Told of the time of every event, which come four times a second or more."""

    def __init__(self) -> None:
        self._last = math.nan  # when the last event came, by the caller's clock
        self._total = 0.0
        self.latest = 0.0  # seconds that the last pause took
        self._over = -math.inf  # when it was over

    def notice(self, now: float) -> bool:
        """Whether the time of an event shows that there has been a pause."""
        pause = now - self._last
        self._last = now
        if not pause > PAUSE_S:  # also if this is the first event
            return False
        self._total += pause
        self.latest, self._over = pause, self.clock(now)
        return True

    def clock(self, now: float) -> float:
        """The time that all limits are reckoned in: monotonic seconds without those of the pauses."""
        return now - self._total

    def explains(self, now: float, timeout_s: float) -> bool:
        """Whether a worker that is dead now has ended itself, because the coordinator was silent for too long."""
        return self.latest >= timeout_s and now - self._over <= 2 * GRACE_S
