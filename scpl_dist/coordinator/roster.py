"""Who is there: the workers of a run, who may become one, and who has ended.

               hello                       lost, closed, not needed
started  ---------------->  present  ------------------------------>  gone
   |                           |
   |  ended before its hello   '-- of the present group, or spare
   '------------------------>  absent, until somebody comes in its place
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from scpl_dist.control.messages import Hello
from scpl_dist.coordinator import lineup
from scpl_dist.coordinator.members import Member, objection
from scpl_dist.coordinator.watchdog import GRACE_S
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure, failure


class Roster:
    """`config` is as the user wrote it: it says how many workers there can be."""

    def __init__(self, config: Config) -> None:
        self.present: dict[bytes, Member] = {}  # workers of the run, by connection
        self.refused: set[bytes] = set()  # connections of those who may still send a heartbeat
        self._given = config
        self._like: Hello | None = None  # of the first group, whom all that come must equal
        self._gone: set[tuple[int | None, int]] = set()  # rank and process id of those that are dealt with
        self._absent: dict[int, tuple[float, str]] = {}  # ranks that ended before their hello: when, how

    # Who comes --------------------------------------------------------------------------------------------------

    def objection(self, hello: Hello) -> str | None:
        """Why a worker does not fit those that are there, with both values."""
        known = [self._like] if self._like else [member.hello for member in self.present.values()]
        return objection(hello, known, self._given.digest())

    def no_room(self, budget: int) -> str | None:
        """Why the group, which is complete, needs nobody, now or later; `budget` are the losses it may survive."""
        room = self._given.layout.world
        if self._given.pipeline.elastic and room <= self._given.pipeline.elastic[1]:
            room = self._given.pipeline.elastic[1]
        there = len(self.staying())
        if there < room or (there == room and budget > 0):  # one may be dead, and nobody has noticed it yet
            return None
        return f"all {room} places are taken"

    def place_taken(self, rank: int | None, members: Mapping[int, Member]) -> str | None:
        """Why a worker that was started for a rank cannot have it while the first group comes together."""
        there = None if rank is None else members.get(rank)
        if there is not None:
            known = there.hello
            return f"{there.name} is taken by rank {known.rank} (pid {known.pid} on {known.host})"
        world = self._given.layout.world
        if rank is not None and rank >= max([world, *self._given.pipeline.elastic[1:]]):
            return f"rank {rank} does not exist, the run has {world} workers"
        return None

    def admit(self, member: Member) -> None:
        self.present[member.peer] = member
        self._gone.discard(_process(member.hello))

    def refuse(self, member: Member) -> None:
        """Its end will be no news."""
        if member.peer not in self.present:
            self._gone.add(_process(member.hello))

    def settle(self, member: Member) -> None:
        """Whoever comes from now on must equal this one: it is in the first group."""
        self._like = self._like or member.hello

    # Who is there -----------------------------------------------------------------------------------------------

    def started(self, rank: int, pid: int) -> Member | None:
        """The worker that was started for a rank, as this process."""
        members = self.present.values()
        return next((one for one in members if _process(one.hello) == (rank, pid)), None)

    def culprit(self, found: Failure) -> Member | None:
        """The worker at the place of a failure; process ids are those of a host."""
        place = (found.host, found.pid)
        members = self.present.values()
        return next((one for one in members if (one.hello.host, one.hello.pid) == place), None)

    def staying(self, without: Member | None = None) -> list[Member]:
        return [one for one in self.present.values() if one is not without and not one.leaving]

    def spare(self) -> list[Member]:
        """Those that could be part of the next group, and are of none."""
        return [member for member in self.staying() if member.free]

    def can_do_without(self, member: Member | None) -> bool:
        """Whether the others are enough for a group, of other stages or fewer replicas."""
        elastic = bool(self._given.pipeline.elastic)
        return elastic and lineup.shape(self._given, self.staying(member)) is not None

    # Who ends ---------------------------------------------------------------------------------------------------

    def drop(self, member: Member) -> None:
        self.present.pop(member.peer, None)
        self._gone.add(_process(member.hello))

    def is_gone(self, rank: int, pid: int) -> bool:
        return (rank, pid) in self._gone

    def ended_early(self, rank: int, how: str, now: float) -> None:
        """The worker of a rank ended before its hello."""
        self._absent.setdefault(rank, (now, how))

    @property
    def absent(self) -> set[int]:
        return set(self._absent)

    def forget_absent(self, rank: int) -> None:
        self._absent.pop(rank, None)

    def never_came(self, now: float) -> Failure | None:
        """The failure of a worker that ended before its hello, once its end is `GRACE_S` old: others may know more."""
        layout = self._given.layout
        for rank, (since, how) in self._absent.items():
            if now - since >= GRACE_S:
                text = f"the worker of rank {rank} ended before it joined the run ({how})"
                stage = layout.workers[rank].stage if rank < layout.world else None
                return replace(failure(Cause.DIED, text), stage=stage, rank=rank)
        return None


def _process(hello: Hello) -> tuple[int | None, int]:
    return hello.rank, hello.pid
