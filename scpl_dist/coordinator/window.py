"""The items on their way: handed to stage 0 ahead of time, and complete when every worker has finished them.

Stage 0 must never wait for the coordinator, and a signal must not wait for a long list. So the list is as long as
what stage 0 does in `LEAD_S` seconds, at the pace at which it has finished items lately.
"""

from __future__ import annotations

import math
from collections import Counter

from scpl_dist.control.items import Item
from scpl_dist.coordinator.item_sequence import ItemSequence

LEAD_S = 0.5  # long against the way of a message, short against the patience after a signal
FIRST = 8
WINDOW = 64


class Window:
    """Takes items from their sequence and follows them; stage 0 never has more than `limit` that it has not begun."""

    def __init__(self, sequence: ItemSequence, limit: int, workers: int) -> None:
        # By sequence number, in that order: items that some worker has yet to finish.
        self.open: dict[int, Item] = {}
        self._workers = workers
        self._finished = Counter[int]()  # workers that have finished an open item
        self._sequence = sequence
        self._limit = limit
        self._sent = 0
        self._begun = -1
        self._pace: float | None = None
        self._previous: float | None = None

    def take(self, begun: int, rest: bool) -> list[Item]:
        """Items to send now; `begun` is the last that stage 0 is known to have begun, `rest` is for a stop: all."""
        self._begun = max(self._begun, begun)
        wanted = FIRST if self._pace is None else max(2, math.ceil(LEAD_S / max(self._pace, 1e-6)))
        ahead = min(self._limit, wanted)
        items: list[Item] = []
        while rest or self._sent - 1 - self._begun < ahead:
            item = self._sequence.next()
            if item is None:
                break
            self.open[item.sequence] = item
            self._sent += 1
            items.append(item)
        return items

    def finished(self, now: float) -> None:
        """Stage 0 has finished an item that it computes: markers take no time, and say nothing of the pace."""
        if self._previous is not None:
            seconds = now - self._previous
            self._pace = seconds if self._pace is None else 0.8 * self._pace + 0.2 * seconds
        self._previous = now

    def complete(self, sequence: int) -> Item | None:
        """One more worker has finished an item: it, if that was the last one. Each finishes them in their order."""
        self._finished[sequence] += 1
        if self._finished[sequence] < self._workers:
            return None
        del self._finished[sequence]
        return self.open.pop(sequence)
