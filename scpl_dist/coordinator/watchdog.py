"""The rules by which a worker is late, hung or dead.

They are here, outside the workers, because a process that holds the interpreter lock or is stopped cannot watch
itself, and pure, because a rule about time is only testable if time is an argument.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from scpl_dist.control.items import Item
from scpl_dist.control.messages import Failed
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure, failure
from scpl_dist.run.phases import BLAMELESS

State = Literal["gathering", "loading", "preparing", "joining", "running", "regrouping", "over"]

GRACE_S = 1.5  # how long a death waits for a report that explains it
PAUSE_S = 5.0  # longer between two events: the coordinator itself was stopped, and no stage is to blame
STOP_GRACE_S = 3.0  # how long a stop that some stages ask for before the first step waits for news of a death


def late(
    members: Mapping[int, Member], config: Config, state: State, waited: float, now: float
) -> Failure | None:
    """The failure of a start that takes too long; `waited` is how many seconds it is in this state.

    `members` are those with a place, by rank.
    """
    runtime = config.runtime
    patience = max(runtime.timeout_s, runtime.first_step_timeout_s)
    if state == "gathering" and waited >= runtime.timeout_s:
        missing = [worker.label for worker in config.layout.workers if worker.rank not in members]
        text = f"no worker for stage {', '.join(missing)} within {runtime.timeout_s:g} s"
        return failure(Cause.MISSING, text)
    for member in members.values():
        if now - member.heard >= runtime.timeout_s:
            return _silent(member, now)
    if state == "loading" and waited >= patience:
        text = f"stage 0 has not read the data set within {patience:g} s"
        advice = "raise runtime.first_step_timeout_s if it only needs longer"
        if 0 not in members:
            return failure(Cause.MISSING, f"{text}: it is not there")
        return blame(members[0], Cause.MISSING, text, advice)
    if state == "regrouping" and waited >= runtime.timeout_s:
        busy = [member for member in members.values() if not member.free]
        if busy:
            text = f"{busy[0].name} did not leave its group within {runtime.timeout_s:g} s"
            return blame(busy[0], Cause.HANG, text)
    if state in ("preparing", "joining") and waited >= patience:
        slow = [member for member in members.values() if not member.ready]
        slow = [member for member in slow if not member.built] or slow
        text = f"{', '.join(member.name for member in slow)} was not ready within {patience:g} s"
        advice = "look into its log, or raise runtime.first_step_timeout_s"
        return blame(slow[0], Cause.MISSING, text, advice)
    return None


def overdue(
    members: Mapping[int, Member], items: Mapping[int, Item], config: Config, now: float
) -> Failure | None:
    """The failure of the stage that is furthest beyond its limit, or of all if all only wait."""
    runtime = config.runtime
    there = [member for member in members.values() if not member.left]
    found: list[tuple[float, Failure]] = []
    for member in there:
        silent = now - member.heard
        still = now - member.changed
        item = items.get(member.done + 1)
        known = item is not None and item.kind in member.kinds
        limit = runtime.timeout_s if known else runtime.first_step_timeout_s
        if silent >= runtime.timeout_s:
            found.append((silent, _silent(member, now)))
        if member.phase not in BLAMELESS and still >= limit:
            text = f"{member.name} has made no progress for {still:.1f} s in phase {member.phase}"
            found.append((still, blame(member, Cause.HANG, text)))
    if found:
        return max(found, key=lambda entry: entry[0])[1]
    still = now - max(member.changed for member in members.values())
    if not there or still < runtime.timeout_s or any(member.phase not in BLAMELESS for member in there):
        return None
    places = ", ".join(f"{member.name}: {member.phase} after item {member.done}" for member in there)
    stuck = failure(Cause.DEADLOCK, f"all stages have only waited for {still:.1f} s ({places})")
    return replace(stuck, phase=there[0].phase, step=max(member.step for member in there))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _silent(member: Member, now: float) -> Failure:
    text = f"{member.name} has been silent for {now - member.heard:.1f} s (not even a heartbeat)"
    return blame(member, Cause.SILENT, text)


@dataclass(slots=True)
class Suspects:
    """Workers that seem to be dead, held for a moment: an own report of a worker is a better cause than its death.

    When one dies the others are ended too, by their neighbours' errors or by whoever started them. So the culprit
    is the one that was suspected first, and not one that complained about another: it was alive after it.
    """

    _found: dict[tuple[bytes, str], tuple[float, str]] = field(default_factory=dict)
    _complained: set[bytes] = field(default_factory=set)

    def add(self, member: Member, now: float, kind: str, text: str) -> None:
        """Suspect a worker because it "exited", "missed" a message, was "accused" by another, or is "unreachable"."""
        self._found.setdefault((member.peer, kind), (now, text))

    @property
    def any(self) -> bool:
        return bool(self._found)

    @property
    def missed(self) -> bool:
        """Whether somebody has missed a message."""
        return any(kind == "missed" for _, kind in self._found)

    def accuse(self, member: Member, accused: Member, report: Failed, now: float) -> None:
        """A worker reported that it lost another one; itself, if it lost one of its replicas without knowing which."""
        self._complained.add(member.peer)
        self.add(accused, now, "accused", f"{member.name} lost it: {report.message}")

    def clear(self, member: Member) -> None:
        """A message came from the worker: its connection is there after all. What it has missed does not come again."""
        self._found.pop((member.peer, "unreachable"), None)

    def forget(self, member: Member) -> None:
        """It is not part of the run any more, and what it and others said of it has been dealt with."""
        self._found = {key: value for key, value in self._found.items() if key[0] != member.peer}
        self._complained.discard(member.peer)

    def forget_complaints(self) -> None:
        """Whoever was accused and still speaks has lost nobody but the one that is gone."""
        self._found = {key: value for key, value in self._found.items() if key[1] != "accused"}
        self._complained.clear()

    def verdict(self, now: float, members: Mapping[bytes, Member]) -> Failure | None:
        """The failure of the most likely culprit once the first suspicion is `GRACE_S` seconds old.

        `members` are all workers of the run by their connection, and all suspects are among them.
        """
        if not self._found or now - min(self._found.values())[0] < GRACE_S:
            return None
        peer, _ = min(self._found, key=lambda key: (key[0] in self._complained, self._found[key][0]))
        texts = {kind: text for (suspect, kind), (_, text) in self._found.items() if suspect == peer}
        how = texts.get("exited") or "; ".join(texts.values())
        member = members[peer]
        place = f"last seen in {member.phase} at step {member.step}, micro-batch {member.micro_batch}"
        who = f"{member.name} ({member.hello.host}, pid {member.hello.pid})"
        if "exited" in texts:
            text = f"{who} died without a report (killed or crashed): {how}; {place}"
            return blame(member, Cause.DIED, text)
        return blame(member, Cause.UNREACHABLE, f"{who} does not answer: {how}; {place}")
