"""What the workers have done by a moment, written down now and then: a report shows the course of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from scpl_dist.coordinator.events import Record
from scpl_dist.coordinator.members import Member

LEAST_S = 1.0
SHARE = 1 / 500  # of the run so far, which is the time between two rows: a long run has few


class Usage:
    """Counters since the start of each process: whoever reads them takes differences."""

    def __init__(self) -> None:
        self._due = 0.0

    def rows(self, members: Iterable[Member], now: float, seconds: float) -> Iterator[Record]:
        """The row that is due `now`, if one is, `seconds` after the first item."""
        if now >= self._due:
            self._due = now + max(LEAST_S, SHARE * seconds)
            yield Record({"event": "usage", "workers": [_of(member) for member in members]})


def _of(member: Member) -> dict[str, float]:
    stats = member.stats
    return {
        "rank": member.rank,
        "busy": round(stats.busy, 4),
        "waiting": round(stats.waiting, 4),
        "blocked": round(stats.blocked, 4),
        "bytes_sent": stats.bytes_sent,
        "peak_memory": stats.peak_memory,
    }
