r"""How far the clocks of the workers' hosts are from the coordinator's, so that a trace has all stages on one.

    coordinator's clock   ---------- alive(c1) ------------------ c2 ----->
                                          \                      /
    worker's clock        -------------- w1 ---- heartbeat(w2) --------->     lag = w1 - c1, delay = c2 - w2

Both differences have the offset of the clocks in them, with opposite signs, and the time on the way, which is never
negative. The least of each within some seconds are the best: offset = (delay - lag) / 2, and it is wrong by at most
(delay + lag) / 2, half of the way there and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scpl_dist.control.messages import Heartbeat
from scpl_dist.coordinator.events import Record

WINDOW_S = 10.0  # in which clocks drift apart by less than what a message takes


class Clocks:
    def __init__(self) -> None:
        self._delays: dict[int, float] = {}  # least of the window, by rank
        self._lags: dict[int, float] = {}
        self._since = math.nan

    def heard(self, rank: int, message: Heartbeat, now: float) -> None:
        if message.clock is None or message.lag is None:
            return
        self._delays[rank] = min(self._delays.get(rank, math.inf), now - message.clock)
        self._lags[rank] = min(self._lags.get(rank, math.inf), message.lag)

    def rows(self, now: float) -> Iterator[Record]:
        """A row at the end of each window: by rank what to add to its clock, and by how much that may be wrong."""
        if math.isnan(self._since):
            self._since = now - 0.8 * WINDOW_S  # a short run has one too
        if now - self._since < WINDOW_S or not self._delays:
            return
        offsets = {
            str(rank): [(delay - self._lags[rank]) / 2, max(0.0, (delay + self._lags[rank]) / 2)]
            for rank, delay in sorted(self._delays.items())
        }
        yield Record({"event": "clock", "at": now, "offsets": offsets})
        self._since = now
        self._delays, self._lags = {}, {}
