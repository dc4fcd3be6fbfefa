"""The coordinator: a pure state machine that schedules the items of a run and watches the stages.

    gathering --all said hello--> loading --data set read--> preparing --all built--> joining --all ready--> running
        |                             |                          |  ^                    |                   |  |
        |                             |                          |  '- all left it  <-- regrouping <---------'  all left
        '-----------------------------'--------------------------'---- failure, signal --'------> over <--------'

A failure that a new start would help against takes the lost worker out, and the others meet anew (who is there is in
`roster.py`, who gets which place in `lineup.py`, who holds which blocks in `block_counts.py`): they
leave their group, and go on from the last cut when a worker has come in its place, or without it. A worker that comes,
goes or gives blocks away is waited for with a cut of its own, so that nothing is trained twice.

`handle(event, now)` is the only way to change it. It reads no clock, socket or file, so each of its decisions can
be replayed in a test. It is never in the way of the tensors: stage 0 gets positions ahead of time, and everything
else flows from stage to stage.
"""

from __future__ import annotations

import math
import signal as signals
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from scpl_dist.control import messages
from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.messages import Dataset, Hello, Message
from scpl_dist.coordinator import events, lineup, watchdog
from scpl_dist.coordinator.block_counts import BlockCounts
from scpl_dist.coordinator.clocks import Clocks
from scpl_dist.coordinator.event_log import EventLog, Origin
from scpl_dist.coordinator.events import (
    Command,
    Commit,
    Committed,
    Event,
    Finish,
    Record,
    Replace,
    Rewind,
    Say,
    Send,
    warning,
)
from scpl_dist.coordinator.item_flow import ItemFlow
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.coordinator.pauses import Pauses
from scpl_dist.coordinator.restarts import End, Restarts
from scpl_dist.coordinator.roster import Roster
from scpl_dist.coordinator.stops import Stops
from scpl_dist.coordinator.usage import Usage
from scpl_dist.coordinator.watchdog import State, Suspects, signal_name
from scpl_dist.run.config import Config
from scpl_dist.run.failures import MEANING, Cause, Failure, Outcome, failure
from scpl_dist.run.layout import Layout
from scpl_dist.storage.checkpoints import folder_of

ALIVE_EVERY_S = 1.0
REFUSALS = 20  # that are reported; more are only counted, so that a stranger cannot fill the disk
LEADER = "stage of the launcher"  # as the source of a signal


class Coordinator:
    def __init__(self, config: Config, origin: Origin) -> None:
        self.config = config  # with the stages and blocks that the present group has
        self.origin = origin  # with the cut that the present group began at
        self.state: State = "gathering"
        self.roster = Roster(config)
        self.members: dict[int, Member] = {}  # those of the present group, or of the last one, by rank
        self.group = 0  # number of the present group
        self.data: Dataset | None = None
        self.torch = ""  # version that all workers have
        self.flow: ItemFlow | None = None  # from when a first group has been formed
        self.rejected: Counter[str] = Counter(dict.fromkeys(("garbage", "refused", "key", "handshake"), 0))
        self.nonfinite_losses = 0
        self.checkpoints = 0
        self.checkpoint_failures = 0
        self.last_commit: tuple[Committed, float] | None = None  # and when it was
        self.outcome: Outcome | None = None
        limit = config.runtime.max_restarts - len(origin.restarted) if origin.replaceable else 0
        self.restarts = Restarts(max(0, limit))
        self.regroups: Counter[str] = Counter()  # by what they were for
        self.number = 0  # of the last event that was handled
        self.log = EventLog(config, origin)
        self._given = config  # as the user wrote it
        self._blocks = BlockCounts(config)
        self._cutting = ""  # why the workers meet anew after the cut that has been ordered
        self._lost: Failure | None = None  # what the workers meet anew after, until they have met
        self._final = ""  # why that could not be survived
        self._commits: dict[int, Commit] = {}  # that are being published, by step
        self._since = math.nan  # when the present state began
        self._until = math.inf  # so long a worker is waited for that is not there
        self._stood = math.nan  # when the last step before the workers met anew was done
        self._pauses = Pauses()
        self._last = math.nan  # when the present event came, by the caller's clock
        self._suspects = Suspects()
        self._stops = Stops()
        self._clocks = Clocks()
        self._usage = Usage()
        self._alive = -math.inf
        self._clocked = math.nan  # the time of the present event, as all limits are reckoned
        self._commands: list[Command] = []

    @property
    def present(self) -> dict[bytes, Member]:
        """Workers of the run, by connection."""
        return self.roster.present

    @property
    def layout(self) -> Layout:
        return self.config.layout

    def handle(self, event: Event, now: float) -> list[Command]:
        """React to one event, at `now` monotonic seconds: what to do, in order; nothing once the run is over."""
        if self.outcome is not None:
            return []
        self.number += 1
        self._commands = []
        self.log.add(self.number, now, event, self._commands)
        self._last = now
        if self._pauses.notice(now):
            pause = f"{self._pauses.latest:.1f} s: it, or its machine, was stopped"
            self._do(warning(f"the coordinator did not run for {pause}"))
        now = self._clocked = self.clock(now)
        if self.number == 1:
            self._since = now
            if self._given.pipeline.elastic:
                self._until = now + self._given.runtime.replace_s
        match event:
            case events.Received(peer, message):
                self._received(peer, message, now)
            case events.Tick():
                self._ticked(now)
            case events.Exited(rank, code, pid):
                self._exited(rank, code, pid, now)
            case events.Unreachable(peer, message):
                self._missed(peer, message, now)
            case events.Signal("launcher", number) if self.origin.led:
                self._leader_ends(number, now)
            case events.Signal(source, number):
                self._signal(source, number, now)
            case events.LauncherLost():  # the end, also of a run that was about to survive something else
                self._end_by(self._lost or failure(Cause.LAUNCHER_LOST, "the launcher is gone"))
            case events.Garbage():
                self.rejected["garbage"] += 1
            case TurnedAway(reason, report):
                self.rejected[reason] += 1
                if report is not None:
                    self._do(warning(report))
            case Committed():
                self._committed(event, now)
            case events.NotWritten(what, text, cause):
                self.checkpoint_failures += what == "checkpoint"
                self._fail(failure(cause, f"{what} could not be written: {text}"))
        return self._commands

    def clock(self, now: float) -> float:
        """The time that all limits are reckoned in: monotonic seconds in which this process was not stopped."""
        return self._pauses.clock(now)

    def ordered(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda member: member.place)

    # Workers ----------------------------------------------------------------------------------------------------

    def _received(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        if isinstance(message, messages.Drain):
            self._drain_asked(peer, message, now)
            return
        if isinstance(message, messages.Closed):  # of a worker that was told to leave, while the run goes on
            return
        member = self.present.get(peer)
        if member is None:
            if peer not in self.roster.refused:
                self.rejected["garbage"] += 1
            return
        member.heard = now
        self._suspects.clear(member)
        match message:
            case messages.Described(data=data):
                self.data = self.data or data
                self._form(now)
            case messages.Free(group=group, endpoint=endpoint) if group == self.group - 1:
                member.free = True
                member.endpoint = endpoint
                self._form(now)
            case messages.Failed(cause=Cause.PEER_LOST):
                # Of a rank that the group does not have: who says so is what is wrong.
                accused = member if message.peer is None else self.members.get(message.peer, member)
                if self._talks(member, message.group):
                    self._suspects.accuse(member, accused, message, now)
            case messages.Failed():
                self._fail(blame(member, message.cause, message.message, report=message), member)
            case messages.StopRequested(signal=number):
                self._stop_requested(member, number, now)
            case messages.Heartbeat(group=group):
                if self._talks(member, group):
                    member.beat(message, now)
                    self._clocks.heard(member.rank, message, self._last)
                    self._feed()
            case (
                messages.Built(group=group)
                | messages.Ready(group=group)
                | messages.Done(group=group)
                | messages.Written(group=group)
                | messages.Left(group=group)
            ):
                if self._talks(member, group):
                    self._took_part(member, message, now)
            case _:
                self.rejected["garbage"] += 1

    def _talks(self, member: Member, group: int) -> bool:
        """Whether this is about the present group."""
        return group == self.group and not member.free and self.state != "regrouping"

    def _took_part(self, member: Member, message: Message, now: float) -> None:
        assert self.flow is not None
        match message:
            case messages.Built(blocks=blocks):
                member.built = True
                member.changed = now
                member.blocks = blocks
                self._join_if_all_built(now)
            case messages.Ready():
                member.ready = True
                member.changed = now
                self._go_if_all_ready(now)
            case messages.Done():
                self._blocks.learn(member, message, self.layout.replicas[member.stage])
                self._do(self.flow.done(member, message, now))
                self._feed()
            case messages.Written():
                self._do(self.flow.written(member, message, now))
            case messages.Left():
                member.left = True
                self._close_if_all_left(now)

    def _missed(self, peer: bytes, message: Message, now: float) -> None:
        """A message could not be handed to a worker; unless that was a sign of life, it cannot go on without it."""
        member = self.present.get(peer)
        if member is None:
            return
        if not isinstance(message, messages.Alive):
            self._suspects.add(member, now, "missed", "a message to it was lost with its connection")
        elif not member.left:
            self._suspects.add(member, now, "unreachable", "its connection is gone")

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        member = Member(peer, hello, heard=now, changed=now, endpoint=hello.endpoint)
        reason = self.roster.objection(hello) or self._no_place(member)
        if reason is None:
            self.roster.admit(member)
            self.torch = hello.torch
            if self.state == "gathering":
                self.members = lineup.assigned([*self.present.values()], self.layout, same=True)
                for rank, placed in self.members.items():
                    placed.worker = self.layout.workers[rank]
            self._form(now)
            self._grow()
            return
        self.rejected["refused"] += 1
        self.roster.refuse(member)
        self._do([Send((peer,), messages.Refuse(reason=reason))])
        wish = "no rank" if hello.rank is None else f"rank {hello.rank}"
        text = f"refused {wish} (pid {hello.pid} on {hello.host}): {reason}"
        needed = self.state == "gathering" and hello.rank is not None and hello.rank < self.layout.world
        stage = self.layout.workers[hello.rank].stage if needed and hello.rank is not None else None
        if self.rejected["refused"] <= REFUSALS:
            self.roster.refused.add(peer)
            self._do(warning(text, stage))
        if needed and hello.rank not in self.members:
            found = blame(member, Cause.CONFIG, text)
            self._fail(replace(found, stage=stage))

    def _no_place(self, candidate: Member) -> str | None:
        """Why there is no place for a worker, now and in the next group."""
        if candidate.peer in self.present:
            return "its connection has said hello before"
        taken = None
        if self.state == "gathering":
            taken = self.roster.place_taken(candidate.hello.rank, self.members)
        return taken or self.roster.no_room(self.restarts.left if self.state != "gathering" else 0)

    def _exited(self, rank: int, code: int, pid: int, now: float) -> None:
        member = self.roster.started(rank, pid)
        how = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        stopped = -code in (signals.SIGTERM, signals.SIGINT)
        if member is None:
            if self.roster.is_gone(rank, pid):
                return
            if stopped and self.state != "running" and not self._suspects.any and self._lost is None:
                self._signal(f"rank {rank}", -code, now)  # it was still loading and could not ask
                return
            self.roster.ended_early(rank, how, now)
            if code < 0:
                self._fail(self.roster.never_came(math.inf))
            return
        if self.state == "running" and (member.left or (code == 0 and "stop" in member.kinds)):
            member.left = True
            self._close_if_all_left(now)
            return
        if member.leaving and member.free:
            self._drop(member)
            return
        if stopped and self.state != "running" and not self._suspects.any and self._lost is None:
            self._signal(f"rank {rank}", -code, now)
            return
        self._suspects.add(member, now, "exited", how)
        if code < 0 and not stopped:  # a killed process can send no report any more
            self._fail(self._suspects.verdict(math.inf, self.present))

    # Workers that come and go -----------------------------------------------------------------------------------

    def _stop_requested(self, member: Member, number: int, now: float) -> None:
        if self.origin.led and member.hello.rank == 0:
            self._leader_ends(number, now)
            return
        if self._is_spare(member):
            self._do([Send((member.peer,), messages.Close())])
            self._drop(member)
            return
        if self._lost is not None or self._suspects.any:
            # When one has died, whoever started the workers may end the others: that is no wish of the user's.
            member.leaving = True
            self._form(now)
            return
        if self._may_leave(member):
            self._drain(member, f"{member.name} on {member.hello.host} got {signal_name(number)}", now)
        else:
            self._signal(member.name, number, now)

    def _leader_ends(self, number: int, now: float) -> None:
        """The worker that has started all of this shall end, and nobody can go on without its process.

        If another one is lost, that is why: torchrun ends the others of a host.
        """
        if self._lost is not None:
            self._end_by(self._lost)
        else:
            self._signal(LEADER, number, now)

    def _may_leave(self, member: Member) -> bool:
        started = self.flow is not None and not self._stops.any
        return started and self.roster.can_do_without(member)

    def _drain(self, member: Member, reason: str, now: float) -> None:
        member.leaving, member.awaited = True, False
        if self.state != "regrouping":
            self._do(warning(f"{reason}: it leaves, and the others go on without it", member.stage))
        self._meet_after_cut("drain", now)
        self._form(now)

    def _drain_asked(self, peer: bytes, message: messages.Drain, now: float) -> None:
        rank = self.layout.rank(message.stage, message.replica)
        member = self.members.get(rank)
        reason = ""
        if member is None or member.peer not in self.present:
            label = f"{message.stage}.{message.replica}" if message.replica else f"{message.stage}"
            reason = f"there is no stage {label} now, the run has {self.layout.stages} stages"
        elif not member.leaving and not self._may_leave(member):
            reason = (
                f"{member.name} cannot leave: pipeline.elastic = {self._given.pipeline.elastic} and "
                f"{len(self.present)} workers, whose state is {self.state}; set pipeline.elastic = [fewest, most]"
            )
        if reason:
            self._do([Send((peer,), messages.Refuse(reason=reason))])
            return
        assert member is not None
        self._do([Send((peer,), messages.Alive())])
        if not member.leaving:
            self._drain(member, f"{member.name} on {member.hello.host} shall be drained", now)

    def _grow(self) -> None:
        """Let a worker that has come while all go on be part of them, where the run may have more stages."""
        if self.state != "running" or not self.roster.spare():
            return
        shape = lineup.shape(self._given, self.roster.staying())
        if shape is not None and sum(shape) > self.layout.world:
            self._meet_after_cut("join", self._clocked)

    def _meet_after_cut(self, what: str, now: float) -> None:
        """Let the workers meet anew when all is on disk that they have trained, so that nothing is lost."""
        if self.flow is None or self.state != "running" or self._stops.any:
            return  # they meet in a moment anyway
        self._cutting = self._cutting or what
        self.flow.sequence.cut()
        self._feed()
        self._meet_if_cut(now)

    def _meet_if_cut(self, now: float) -> None:
        flow = self.flow
        if (
            self._cutting
            and flow is not None
            and self.state == "running"
            and not self._stops.any
            and flow.resting
        ):
            what, self._cutting = self._cutting, ""
            self._regroup(what, now)

    def _fail(self, found: Failure | None, member: Member | None = None) -> None:
        """A failure, which the run survives if a new start of what was lost may help."""
        if found is None or self.outcome is not None:
            return
        self.nonfinite_losses += found.cause is Cause.NONFINITE
        if member is None and found.pid is not None:
            member = self.roster.culprit(found)
        if self._is_spare(member) or (
            member is None and self._is_together() and found.rank in self.roster.absent
        ):
            self._do(warning(f"{found.message}: no group has it, the others go on"))
            self._forget(found, member)
            return
        counted = len(self.restarts.causes)
        reason = self._not_survived(found, member)
        if reason is None:
            self._survive(found, member, self._clocked, replaced=len(self.restarts.causes) > counted)
            return
        self._final = reason if self.origin.replaceable else ""  # whoever starts all again knows better
        self._end_by(found)

    def _not_survived(self, found: Failure, member: Member | None) -> str | None:
        """Why the run is over after a failure; None if it goes on, which is then counted."""
        culprit = member is not None or found.cause is Cause.DEADLOCK or found.rank in self.roster.absent
        if not culprit or found.cause in (Cause.LAUNCHER_LOST, Cause.COORDINATOR_LOST):
            return ""
        if self._stops.asked(LEADER):  # it ends, whatever came first
            return ""
        if self._stops.any and not (member and self._stops.came_of(member.name, self._clocked)):
            return ""
        fits = self.roster.can_do_without(member)
        if fits and member is not None and member.leaving:
            return None
        step = self.flow.results.steps_done - 1 if self.flow is not None else -1
        refusal = self.restarts.refusal(End(1, found.cause, found.message, found.stage, step))
        if refusal is None:
            return None
        spent = self.restarts.left <= 0 and not MEANING[found.cause].final
        return None if spent and fits and self.flow is not None else refusal

    def _survive(self, found: Failure, member: Member | None, now: float, replaced: bool) -> None:
        again = self.state == "regrouping"
        if self._lost is None or not again:
            self._lost = found
        for one in self.present.values():  # a stop that came of the loss is only theirs
            one.leaving = one.leaving or self._stops.asked(one.name)
        self._stops = Stops()
        row = {"event": "restart", "number": len(self.restarts.causes), "cause": found.cause}
        self._do([Record(row | {"reason": found.message, "stage": found.stage})])
        rank = member.hello.rank if member is not None else found.rank
        # The rank for which one is started; who joined without does not come again.
        started = rank if replaced else None
        if started is None:
            for one in self.members.values():
                if one is member or (rank is not None and one.hello.rank == rank):
                    one.awaited = False
        limit = f"{len(self.restarts.causes)} of {self.restarts.limit}"
        goes_on = started is None and self.roster.can_do_without(member)
        what = "going on without it" if goes_on else f"replacing it ({limit})"
        if member is None and found.rank is None:
            what = f"all meet anew ({limit})"
        self._do([Say(f"{found.message}: {what}", "warning")])
        self._forget(found, member)
        until = now + self._given.runtime.replace_s if replaced else now
        self._until = max(until, self._until) if again else until  # another one may be on its way
        if started is not None:
            self._do([Replace(started, None if member is None else member.hello.pid)])
        self._regroup("loss", now)

    def _forget(self, found: Failure, member: Member | None) -> None:
        """Whoever has failed is not part of the run any more."""
        if member is not None:
            self._do([Send((member.peer,), messages.Abort(reason=found.message[:1000]))])
            self._drop(member)
        elif found.rank is not None:
            self.roster.forget_absent(found.rank)
        self._suspects.forget_complaints()

    def _is_together(self) -> bool:
        """Whether there is a group that nobody needs to be added to."""
        return self.state in ("preparing", "joining", "running")

    def _is_spare(self, member: Member | None) -> bool:
        """Whether a worker is there that the present group does without."""
        return member is not None and member.free and self._is_together()

    def _drop(self, member: Member) -> None:
        self.roster.drop(member)
        self._suspects.forget(member)
        if self.state == "gathering" and member.worker is not None:
            self.members.pop(member.rank, None)

    def _regroup(self, what: str, now: float) -> None:
        """Have all leave their group, if they are in one, and meet anew."""
        self._cutting = ""
        if self.state in ("gathering", "loading"):  # they have not met yet
            self.state = "gathering"
            self._since = now
            self.members = {rank: one for rank, one in self.members.items() if one.peer in self.present}
            self._form(now)
            return
        if self.state != "regrouping":
            self.regroups[what] += 1
            self.state = "regrouping"
            self.group += 1
            self._stood = now
            if what != "loss":  # or else it is known already how long somebody is waited for
                self._until = now if self._given.pipeline.elastic else now + self._given.runtime.replace_s
            peers = tuple(member.peer for member in self.ordered() if member.peer in self.present)
            reason = self._lost.message if self._lost is not None and what == "loss" else what
            self._do([Send(peers, messages.Regroup(reason=reason[:1000]))])
        self._since = now
        self._form(now)

    def _form(self, now: float) -> None:
        """Form the next group, if all that shall be part of it are there, or are not waited for any more."""
        if self.state not in ("gathering", "loading", "regrouping"):
            return
        for member in [one for one in self.present.values() if one.leaving and one.free]:
            self._do([Send((member.peer,), messages.Close())])
            self._drop(member)
        there = [*self.present.values()]
        if any(not member.free for member in there) or (self.flow is not None and self._commits):
            return
        if self._suspects.any:  # it turns out in a moment who of them is dead
            return
        shape = lineup.shape(self._given, there)
        expected = self._given.layout.world
        if self._given.pipeline.elastic:
            expected = self.layout.world - sum(not member.awaited for member in self.members.values())
        if len(there) < expected and now < self._until:
            return
        if shape is None:
            if now >= self._until and (self._lost is not None or self.state == "regrouping"):
                self._give_up()
            return
        if self.data is None:
            if self.state == "gathering":
                self.state, self._since = "loading", now
            return
        self._start(there, shape, now)

    def _give_up(self) -> None:
        few = f"{len(self.present)} workers are left, which is too few"
        lost = self._lost or failure(Cause.MISSING, few)
        if self._given.runtime.max_restarts > 0:
            waited = (
                f"no worker came in its place within {self._given.runtime.replace_s:g} s (runtime.replace_s)"
            )
            self._do([Say(waited, "warning")])
        meaning = MEANING[lost.cause]
        self._over(Outcome(meaning.code, lost.cause, lost), messages.Abort(reason=lost.message[:1000]))

    # The way of a run -------------------------------------------------------------------------------------------

    def _start(self, there: list[Member], shape: list[int], now: float) -> None:
        assert self.data is not None
        same = len(shape) == self.layout.stages
        counts = self._blocks.of_next(shape)
        first = self.flow is None
        if not (first and same and tuple(shape) == self.layout.replicas):
            self.config = self._blocks.shaped(shape, counts)
        self.members = lineup.assigned(there, self.layout, same)
        self.roster.settle(self.members[0])
        for rank, member in self.members.items():
            member.join(self.layout.workers[rank], now)
        try:
            flow = ItemFlow(self.config, self.origin, self.members, self.data, self.group)
        except ValueError as error:
            self._fail(failure(Cause.CONFIG, str(error)))
            return
        if self.flow is not None:
            flow.results.goes_on(self.flow.results, self.flow.seconds(now))
            position = self.origin.resume or {}
            self._do([Rewind(position.get("step", 0), position.get("epoch", 0))])
        self.flow = flow
        self._suspects.forget_complaints()
        self._since = now
        self.state = "preparing"
        endpoints = [
            member.endpoint | {"name": member.name} if member.endpoint else {} for member in self._by_rank()
        ]
        for member in self._by_rank():
            start = messages.Start(
                group=self.group,
                generation=self.origin.generation,
                rank=member.rank,
                replicas=list(self.layout.replicas),
                partition=[] if first and same else counts,
                data=self.data,
                restore=self.origin.restore,
                folder=self.origin.folder,
                endpoints=endpoints,
            )
            self._do([Send((member.peer,), start)])

    def _by_rank(self) -> list[Member]:
        return [self.members[rank] for rank in sorted(self.members)]

    def _join_if_all_built(self, now: float) -> None:
        if self.state != "preparing" or not all(member.built for member in self.members.values()):
            return
        firsts = [self.members[self.layout.rank(stage, 0)] for stage in range(self.layout.stages)]
        self._blocks.built(firsts)
        self.state = "joining"
        self._tell_all(messages.Join())

    def _go_if_all_ready(self, now: float) -> None:
        ready = all(member.ready for member in self.members.values())
        if self.flow is None or self.state != "joining" or not ready:
            return
        if self._stops.any:
            self._stop_early()
            return
        self.state = "running"
        self._lost = None
        for member in self.members.values():
            member.changed = now
        if self.group:
            self._blocks.goes_on(now, now - self._stood)
        self._do(self.flow.begin(now))
        self._tell_all(messages.Go())
        self._feed()
        self._grow()
        if any(member.leaving for member in self.present.values()):
            self._meet_after_cut("drain", now)

    def _feed(self) -> None:
        if self._suspects.missed:  # what came after it would show a gap in the items
            return
        if self.flow is not None and self.state == "running":
            self._do(self.flow.feed(rest=self._stops.any))

    def _move_if_it_pays(self, now: float) -> None:
        if self.state != "running" or self.flow is None or self._cutting or self._stops.any:
            return
        before = self._blocks.present
        wanted = self._blocks.better(self.layout, now, self.flow.seconds_left(now))
        if wanted is not None:
            text = f"blocks of the stages {before} -> {wanted}: a faster cut by what each block takes now"
            self._do([Say(text), Record({"event": "move", "from": before, "to": wanted})])
            self._meet_after_cut("move", now)

    def _committed(self, event: Committed, now: float) -> None:
        self.checkpoints += 1
        self.last_commit = event, now
        row = {"event": "checkpoint", "step": event.step, "bytes": event.bytes, "seconds": event.seconds}
        self._do([Record(row)])
        commit = self._commits.pop(event.step, None)
        if commit is not None:  # from here on it is what the workers go back to when one is lost
            place = folder_of(Path(self.origin.folder), event.step)
            self.origin = replace(self.origin, resume=commit.position, restore=str(place))
        if self.flow is not None:
            self.flow.checkpoints.published(event.step)
        self._meet_if_cut(now)
        self._form(now)
        self._close_if_all_left(now)

    def _close_if_all_left(self, now: float) -> None:
        left = all(member.left for member in self.members.values())
        if self.flow is None or self.state != "running" or not left or self.flow.checkpoints.pending:
            return
        if self._stops.any and not self.flow.sequence.finished:
            text = f"stopped by {self._stops.name}"
            self._over(Outcome(128 + self._stops.number, text), messages.Close())
            return
        self._do(self._usage.rows(self.ordered(), math.inf, 0.0))
        result = self.flow.results.result(self.config, self.ordered(), self.flow.seconds(now))
        self._over(Outcome(0, "done", result=result), messages.Close())

    def _ticked(self, now: float) -> None:
        if now - self._alive >= ALIVE_EVERY_S and self.present:
            self._alive = now
            self._do([Send(tuple(self.present), messages.Alive(clock=self._last))])
        if self.flow is not None and self.state == "running":
            self._do(self._usage.rows(self.ordered(), now, self.flow.seconds(now)))
            if self.config.trace.every:
                self._do(self._clocks.rows(self._last))
        self._fail(self._verdict(now) or self.roster.never_came(now) or self._overdue(now))
        self._form(now)
        self._meet_if_cut(now)  # the cut may have been there already, when it was ordered
        self._move_if_it_pays(now)
        self._turn_away(now)
        dying = self._suspects.any or self.roster.absent
        if self._stops.due(now) and self.state != "running" and not dying:
            self._stop_early()

    def _verdict(self, now: float) -> Failure | None:
        found = self._suspects.verdict(now, self.present)
        if found is None or not self._pauses.explains(now, self.config.runtime.timeout_s):
            return found
        pause = f"{self._pauses.latest:.1f} s, and the workers ended without it ({found.message})"
        return failure(Cause.COORDINATOR_LOST, f"the coordinator did not run for {pause}")

    def _overdue(self, now: float) -> Failure | None:
        there = {rank: member for rank, member in self.members.items() if member.peer in self.present}
        unpublished = None if self.flow is None else self.flow.checkpoints.unpublished(self.config, now)
        if self.flow is None or self.state != "running":
            found = watchdog.late(there, self.config, self.state, now - self._since, now)
            if found is not None and found.cause is Cause.MISSING and self.state == "gathering":
                return self._lost or found
            return found or unpublished
        found = unpublished or self.flow.checkpoints.late(self.members, self.config, now)
        return found or watchdog.overdue(there, self.flow.window.open, self.config, now)

    def _turn_away(self, now: float) -> None:
        """Workers that nobody needs, and newcomers that have fallen silent."""
        runtime = self._given.runtime
        placed = {member.peer for member in self.members.values()}
        for member in [one for one in self.present.values() if one.free and one.peer not in placed]:
            name = f"{member.name} on {member.hello.host}"
            if now - member.heard >= runtime.timeout_s:
                text = f"{name} has been silent for {now - member.heard:.1f} s, and no group has it"
            elif self.state == "running" and not self._cutting and now - member.changed >= runtime.replace_s:
                text = f"{name} is not needed: all places are taken"
            else:
                continue
            self._do([*warning(text), Send((member.peer,), messages.Refuse(reason=text))])
            self._drop(member)

    # Ends -------------------------------------------------------------------------------------------------------

    def _signal(self, source: str, number: int, now: float) -> None:
        name = signal_name(number)
        if not self._stops.add(source, number):
            text = f"stopped at once by a second {name}"
            self._over(Outcome(128 + number, text), messages.Abort(reason=text))
            return
        self._cutting = ""
        if source.startswith("stage "):
            self._stops.wait(now)
        if self.state == "regrouping" and not source.startswith("stage "):
            self._stop_early()
        elif self.flow is not None and self.state == "running":
            if self._stops.sources == 1:
                self._do([Say(f"{name}: writing a checkpoint, then stopping")])
                self.flow.sequence.stop()
                self._feed()
        elif not source.startswith("stage ") or self._stops.sources >= self.layout.world:
            self._stop_early()

    def _stop_early(self) -> None:
        step = (self.origin.resume or {}).get("step", 0)
        when = (
            f"between two groups; the run goes on from step {step}" if self.group else "before the first step"
        )
        text = f"stopped by {self._stops.name} {when}"
        self._over(Outcome(128 + self._stops.number, text), messages.Abort(reason=text))

    def _end_by(self, found: Failure) -> None:
        """A failure that the run does not survive."""
        meaning = MEANING[found.cause]
        last = messages.Abort(reason=found.message[:1000], stacks=meaning.stacks)
        self._over(Outcome(meaning.code, found.cause, found), last)

    def _over(self, outcome: Outcome, last: messages.Abort | messages.Close) -> None:
        if self.outcome is not None:
            return
        outcome = replace(outcome, survived=tuple(self.restarts.causes), final=self._final)
        self._do([Send(tuple(self.present), last)])
        self._do([Finish(outcome, tuple(self.present) if isinstance(last, messages.Close) else ())])
        self.state = "over"
        self.outcome = outcome

    # Commands ---------------------------------------------------------------------------------------------------

    def _tell_all(self, message: Message) -> None:
        there = [member.peer for member in self.ordered() if member.peer in self.present]
        self._do([Send(tuple(there), message)])

    def _do(self, found: Iterable[Command | Failure]) -> None:
        """Command something, or fail, with the number of the event behind it; the many rows of steps go without."""
        for command in found:
            if self.outcome is not None:
                return
            if isinstance(command, Failure):
                self._fail(command)
                return
            if isinstance(command, Commit):
                self._commits[command.step] = command
            if isinstance(command, Record) and command.row["event"] != "train":
                command = replace(command, row=command.row | {"event_number": self.number})
            self._commands.append(replace(command, cause=self.number))
