"""The stages as the coordinator knows them, and the rules by which one of them stands still.

The rules are here, outside the workers, because a process that holds the interpreter lock or is stopped cannot
watch itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scpl_dist.config import Config
from scpl_dist.events import WAITING, Done, Failed, Failure, Heartbeat, Hello, Stats

__all__ = ["Member", "Suspects", "blame", "overdue"]

GRACE_S = 1.5
"""How long a death waits for a report that explains it."""
STANDING_STILL = (
    "if this stage is only slow, raise runtime.timeout_s (or runtime.first_step_timeout_s for its first item); "
    "otherwise look at its stack in the log"
)


@dataclass(slots=True)
class Member:
    """One stage of the run. Times are monotonic seconds."""

    peer: bytes
    hello: Hello
    heard: float
    """When a message came last."""
    changed: float
    """When the stage last did something else than before."""
    phase: str = "starting"
    step: int = 0
    epoch: int = 0
    micro_batch: int | None = None
    ready: bool = False
    left: bool = False
    blocks: int | None = None
    done: int = -1
    """Sequence number of the last item that the stage finished."""
    kinds: set[str] = field(default_factory=set)
    """Kinds of items that the stage has finished at least once."""
    done_busy: float = 0.0
    """Busy seconds of the stage when it finished that item."""
    stats: Stats = field(default_factory=Stats)
    losses: dict[str, float] = field(default_factory=dict)
    """Latest loss of each of the stage's blocks."""
    micro_batches: Counter[str] = field(default_factory=Counter)
    stragglings: int = 0
    slow_in_a_row: int = 0

    @property
    def stage(self) -> int:
        """Index of the stage."""
        return self.hello.stage

    def beat(self, message: Heartbeat, now: float) -> None:
        """Take over what a heartbeat says."""
        place = (message.phase, message.step, message.micro_batch)
        if place != (self.phase, self.step, self.micro_batch) or message.stats.begun != self.stats.begun:
            self.changed = now
        self.phase, self.step, self.micro_batch = place
        self.epoch = message.epoch
        self.stats = message.stats

    def finish(self, message: Done, item: Mapping[str, Any], now: float) -> None:
        """Take over what a finished item says."""
        self.done = message.sequence
        self.done_busy = message.stats.busy
        self.changed = now
        self.kinds.add(message.kind)
        self.stats = message.stats
        if message.kind == "train":
            self.step, self.epoch = item["step"], item["epoch"]
        self.micro_batches[message.kind] += len(item.get("micro_batches", ()))


def blame(member: Member, cause: str, message: str, advice: str, report: Failed | None = None) -> Failure:
    """A failure at the place where the stage was seen last, or where its own report says it was."""
    seen = report or member
    return Failure(
        cause=cause,
        message=message,
        advice=advice,
        stage=member.stage,
        host=member.hello.host,
        rank=member.hello.rank,
        pid=member.hello.pid,
        phase=seen.phase,
        step=seen.step,
        micro_batch=seen.micro_batch,
        traceback=report.traceback or None if report else None,
    )


def overdue(
    members: Sequence[Member], items: Mapping[int, Mapping[str, Any]], config: Config, now: float
) -> Failure | None:
    """The failure of the stage that stands still longest beyond its limit, or of all if all only wait.

    Args:
        members: all stages, after the run has started.
        items: the items by sequence number that some stage has yet to finish.
        config: for ``runtime.timeout_s`` and ``runtime.first_step_timeout_s``.
        now: monotonic seconds.
    """
    timeout, first = config.runtime.timeout_s, config.runtime.first_step_timeout_s
    worst: tuple[float, Failure] | None = None
    for member in members:
        if member.left:
            continue
        silent = now - member.heard
        if silent >= timeout:
            text = f"stage {member.stage} has been silent for {silent:.1f} s (not even a heartbeat)"
            advice = (
                "its process is stopped, its interpreter is blocked in native code, or its host is cut off"
            )
            found = (silent - timeout, blame(member, "silent", text, advice))
        elif member.phase not in WAITING:
            kind = items.get(member.done + 1, {}).get("kind")
            limit = timeout if kind in member.kinds else first
            still = now - member.changed
            if still < limit:
                continue
            text = f"stage {member.stage} has made no progress for {still:.1f} s in phase {member.phase}"
            found = (still - limit, blame(member, "hang", text, STANDING_STILL))
        else:
            continue
        if worst is None or found[0] > worst[0]:
            worst = found
    return worst[1] if worst else _deadlock(members, timeout, now)


def _deadlock(members: Sequence[Member], timeout: float, now: float) -> Failure | None:
    """All stages wait for each other: nobody is to blame, and nobody will move."""
    there = [member for member in members if not member.left]
    if not there or any(member.phase not in WAITING for member in there):
        return None
    still = now - max(member.changed for member in members)
    if still < timeout:
        return None
    places = ", ".join(f"stage {member.stage}: {member.phase} after item {member.done}" for member in there)
    return Failure(
        cause="deadlock",
        message=f"all stages have only waited for {still:.1f} s ({places})",
        advice="a message between two stages was lost: check the network between their hosts, then resume",
        phase=there[0].phase,
        step=max(member.step for member in there),
    )


@dataclass(slots=True)
class Suspects:
    """Stages that seem to be dead, held for a moment: an own report of a stage is a better cause than its death.

    When one dies its neighbours fail too, so the first stage that the launcher sees exit need not be the first
    that died: a stage that complained about another one was alive after it.
    """

    _found: list[tuple[int, float, str, str]] = field(default_factory=list)
    _reported: set[int] = field(default_factory=set)

    def add(self, stage: int, now: float, text: str, kind: str) -> None:
        """Suspect a stage because it "exited", was "accused" by another, or is "unreachable"."""
        if not any(found[0] == stage and found[3] == kind for found in self._found):
            self._found.append((stage, now, text, kind))

    def report(self, stage: int) -> None:
        """A stage complained about another one."""
        self._reported.add(stage)

    def clear(self, stage: int) -> None:
        """A message came from the stage: its connection is there after all."""
        self._found = [found for found in self._found if found[0] != stage or found[3] != "unreachable"]

    def verdict(self, now: float, members: Mapping[int, Member]) -> Failure | None:
        """The failure of the most likely culprit once the first suspicion is `GRACE_S` seconds old."""
        if not self._found or now - self._found[0][1] < GRACE_S:
            return None
        stage, _, text, kind = min(
            self._found, key=lambda found: (found[0] in self._reported, found[3] != "exited", found[1])
        )
        advice = "look into its log, and into the system's log for an out-of-memory kill; then resume"
        member = members.get(stage)
        if member is None:
            return Failure(
                "died", f"rank {stage} ended before it joined the run ({text})", advice, rank=stage
            )
        place = f"last seen in {member.phase} at step {member.step}, micro-batch {member.micro_batch}"
        what = (
            "exited early"
            if kind == "exited" and "exit code" in text
            else "died without a report (killed or crashed)"
        )
        who = f"stage {stage} ({member.hello.host}, pid {member.hello.pid})"
        return blame(member, "died", f"{who} {what}: {text}; {place}", advice)
