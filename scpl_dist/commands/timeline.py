"""What the workers of a run have recorded, all on one clock: that of the coordinator, or the one that they share."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.storage.spans import Passed, Recording, Span, recordings

Estimate = tuple[float, float, float]  # when, what to add to the clock, by how much that may be wrong


@dataclass(frozen=True)
class Lane:
    """One process of a worker, with what to add to its times."""

    recording: Recording
    label: str  # such as "0", or "0.1" where the stage has several workers
    estimates: list[Estimate]  # of its machine's clock, in the order of time; empty: it is the clock of all

    def shifted(self, at: float) -> float:
        """A time of its clock on the common one."""
        if not self.estimates:
            return at
        place = bisect.bisect(self.estimates, (at,))
        before, behind = (
            self.estimates[max(0, place - 1)],
            self.estimates[min(place, len(self.estimates) - 1)],
        )
        if before[0] == behind[0]:
            return at + before[1]
        share = min(1.0, max(0.0, (at - before[0]) / (behind[0] - before[0])))
        return at + before[1] + share * (behind[1] - before[1])

    @property
    def error_s(self) -> float:
        """By how much its times may be wrong against those of other machines."""
        return max((error for _, _, error in self.estimates), default=0.0)


@dataclass(frozen=True)
class Arrow:
    """A message from one lane to another, by their places in the list."""

    source: int
    target: int
    sent: float
    taken: float


def lanes(run_dir: Path) -> list[Lane]:
    """All recordings; ValueError if there are none, or if clocks of several machines were not compared."""
    found = [one for one in recordings(RunFolder(run_dir).log) if one.spans]
    if not found:
        raise ValueError(
            f"{run_dir} has no trace: train with -o trace.every=1, or 100 for 8 steps out of each 100"
        )
    several = {one.stage for one in found if one.replica}
    labels = [f"{one.stage}.{one.replica}" if one.stage in several else str(one.stage) for one in found]
    machines = {one.boot: [other.rank for other in found if other.boot == one.boot] for one in found}
    estimates: dict[str, list[Estimate]] = {boot: [] for boot in machines}
    if len(machines) > 1:
        rows = [row for row in RunFolder(run_dir).metrics.rows() if row["event"] == "clock"]
        estimates = {boot: _estimates(rows, ranks) for boot, ranks in machines.items()}
        lost = [one.host for one in found if not estimates[one.boot]]
        if lost:
            raise ValueError(
                f"{run_dir}: the clock of {lost[0]} was never compared with the coordinator's: the run was shorter "
                "than a few seconds, or its metrics.jsonl is not whole; trace a longer one"
            )
    return [Lane(one, label, estimates[one.boot]) for one, label in zip(found, labels, strict=True)]


def _estimates(rows: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> list[Estimate]:
    """The best of a machine's ranks at each time, on its own clock."""
    found = []
    for row in rows:
        known = [row["offsets"][str(rank)] for rank in ranks if str(rank) in row["offsets"]]
        if known:
            offset, error = min(known, key=lambda pair: float(pair[1]))
            found.append((row["at"] - offset, offset, error))
    return found


def arrows(found: Sequence[Lane]) -> Iterator[Arrow]:
    """Messages of which both ends were recorded."""
    sent: dict[tuple[str, int, int, int], tuple[int, Passed]] = {}
    for place, lane in enumerate(found):
        one = lane.recording
        for message in one.messages:
            if message.sent:
                sent[one.generation, one.rank, message.rank, message.number] = place, message
    for place, lane in enumerate(found):
        one = lane.recording
        for message in one.messages:
            start = sent.get((one.generation, message.rank, one.rank, message.number))
            if not message.sent and start is not None:
                source, posted = start
                yield Arrow(source, place, found[source].shifted(posted.at), lane.shifted(message.at))


def title(span: Span) -> str:
    return span.phase if span.block < 0 else f"{span.phase} {span.block}"
