"""The coordinator: a pure state machine that schedules the items of a run and watches the stages.

    gathering --all said hello--> loading --data set read--> preparing --all ready--> running --all left--> over
        '-------------------------------'-------------------'--failure, signal----'

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

from scpl_dist.control import messages
from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.messages import Dataset, Hello, Message
from scpl_dist.coordinator import events, watchdog
from scpl_dist.coordinator.event_log import EventLog, Origin
from scpl_dist.coordinator.events import Command, Committed, Event, Finish, Record, Say, Send, warning
from scpl_dist.coordinator.item_flow import ItemFlow
from scpl_dist.coordinator.members import Member, blame, objection
from scpl_dist.coordinator.watchdog import State, Suspects, signal_name
from scpl_dist.run.config import Config
from scpl_dist.run.failures import MEANING, Cause, Failure, Outcome, failure

ALIVE_EVERY_S = 1.0
REFUSALS = 20  # that are reported; more are only counted, so that a stranger cannot fill the disk


class Coordinator:
    def __init__(self, config: Config, origin: Origin) -> None:
        self.config = config
        self.origin = origin
        self.layout = config.layout
        self.state: State = "gathering"
        self.members: dict[int, Member] = {}  # workers that have joined, by rank
        self.data: Dataset | None = None
        self.flow: ItemFlow | None = None  # from when all workers have joined and the data set is read
        self.rejected: Counter[str] = Counter(dict.fromkeys(("garbage", "refused", "key", "handshake"), 0))
        self.nonfinite_losses = 0
        self.checkpoints = 0
        self.checkpoint_failures = 0
        self.last_commit: tuple[Committed, float] | None = None  # and when it was
        self.outcome: Outcome | None = None
        self.number = 0  # of the last event that was handled
        self.log = EventLog(config, origin)
        self._since = math.nan  # when the present state began
        self._last = math.nan  # when the last event came, by the caller's clock
        self._paused = 0.0  # seconds in which this process was stopped
        self._last_pause = (0.0, -math.inf)  # how long the last of these times was, and when it was over
        self._suspects = Suspects(config.layout)
        self._signalled: dict[str, int] = {}
        self._stop_at = math.inf
        self._alive = -math.inf
        self._refused: set[bytes] = set()
        self._commands: list[Command] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        """React to one event, at `now` monotonic seconds: what to do, in order; nothing once the run is over."""
        if self.outcome is not None:
            return []
        self.number += 1
        self._commands = []
        self.log.add(self.number, now, event, self._commands)
        self._notice_pause(now)
        now = self.clock(now)
        if self.number == 1:
            self._since = now
        match event:
            case events.Received(peer, message):
                self._received(peer, message, now)
            case events.Tick():
                self._ticked(now)
            case events.Exited(rank, code):
                self._exited(rank, code, now)
            case events.Unreachable(peer):
                member = self._member(peer)
                if member is not None and not member.left:
                    self._suspects.add(member.hello.rank, now, "unreachable", "its connection is gone")
            case events.Signal(source, number):
                self._signal(source, number, now)
            case events.LauncherLost():
                self._fail(failure(Cause.LAUNCHER_LOST, "the launcher is gone"))
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
        """The time that all limits are reckoned in: monotonic seconds without those in which this process was stopped.

        Nobody listened meanwhile, so nobody can be blamed for silence or for being slow.
        """
        return now - self._paused

    def ordered(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda member: member.place)

    def _notice_pause(self, now: float) -> None:
        pause = now - self._last
        self._last = now
        if pause > watchdog.PAUSE_S:
            self._paused += pause
            self._last_pause = pause, self.clock(now)
            self._do(
                warning(f"the coordinator did not run for {pause:.1f} s: it, or its machine, was stopped")
            )

    # Workers ----------------------------------------------------------------------------------------------------

    def _member(self, peer: bytes) -> Member | None:
        return next((member for member in self.members.values() if member.peer == peer), None)

    def _received(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        member = self._member(peer)
        if member is None:
            if peer not in self._refused:  # who may still send a heartbeat
                self.rejected["garbage"] += 1
            return
        member.heard = now
        self._suspects.clear(member.hello.rank)
        match message:
            case messages.Described(data=data):
                self.data = self.data or data
                self._start(now)
            case messages.Ready():
                member.ready = True
                member.changed = now
                self._go_if_all_ready(now)
            case messages.Heartbeat():
                member.beat(message, now)
                self._feed()
            case messages.Done() if self.flow is not None:
                self._do(self.flow.done(member, message, now))
                self._feed()
            case messages.Written() if self.flow is not None:
                self._do(self.flow.written(member, message, now))
            case messages.Failed(cause=Cause.PEER_LOST):
                self._suspects.accuse(member, message, now)
            case messages.Failed():
                self._fail(blame(member, message.cause, message.message, report=message))
            case messages.StopRequested(signal=number):
                if not self._suspects.any:  # when one has died, the launcher ends the others
                    self._signal(member.name, number, now)
            case messages.Left():
                member.left = True
                self._close_if_all_left(now)
            case _:
                self.rejected["garbage"] += 1

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        several = self.layout.rank(hello.stage, 1) >= 0
        member = Member(peer, hello, heard=now, changed=now, several=several)
        rank = self.layout.rank(*member.place)
        reason = objection(member, self.members.values(), self.config)
        if reason is None:
            self.members[rank] = member
            self._start(now)
            return
        self.rejected["refused"] += 1
        self._do([Send((peer,), messages.Refuse(reason=reason))])
        text = f"refused rank {hello.rank} (stage {hello.stage}, pid {hello.pid} on {hello.host}): {reason}"
        if self.rejected["refused"] <= REFUSALS:
            self._refused.add(peer)
            self._do(warning(text, hello.stage))
        if rank >= 0 and rank not in self.members:
            self._fail(blame(member, Cause.CONFIG, text))

    def _exited(self, rank: int, code: int, now: float) -> None:
        member = self.members.get(rank)
        if member is not None and (member.left or (code == 0 and "stop" in member.kinds)):
            member.left = True
            self._close_if_all_left(now)
            return
        stopped = -code in (signals.SIGTERM, signals.SIGINT)
        if stopped and self.state != "running" and not self._suspects.any:
            self._signal(f"rank {rank}", -code, now)  # it was still loading and could not ask
            return
        how = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        self._suspects.add(rank, now, "exited", how)
        if code < 0 and not stopped:  # a killed process can send no report any more
            self._fail(self._suspects.verdict(math.inf, self.members))

    # The way of a run -------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        if self.flow is not None or len(self.members) < self.layout.world:
            return
        self._since = now
        self.state = "loading"
        if self.data is None:
            return
        try:
            self.flow = ItemFlow(self.config, self.origin, self.members, self.data)
        except ValueError as error:
            self._fail(failure(Cause.CONFIG, str(error)))
            return
        self.state = "preparing"
        self._tell_all(
            messages.Start(
                generation=self.origin.generation,
                data=self.data,
                restore=self.origin.restore,
                folder=self.origin.folder,
                endpoints=[self.members[worker.rank].hello.endpoint for worker in self.layout.workers],
            )
        )

    def _go_if_all_ready(self, now: float) -> None:
        ready = all(member.ready for member in self.members.values())
        if self.flow is None or self.state != "preparing" or not ready:
            return
        if self._signalled:
            self._stop_early()
            return
        self.state = "running"
        for member in self.members.values():
            member.changed = now
        self._do(self.flow.begin(now))
        self._tell_all(messages.Go())
        self._feed()

    def _feed(self) -> None:
        if self.flow is not None and self.state == "running":
            self._do(self.flow.feed(rest=bool(self._signalled)))

    def _committed(self, event: Committed, now: float) -> None:
        self.checkpoints += 1
        self.last_commit = event, now
        row = {"event": "checkpoint", "step": event.step, "bytes": event.bytes, "seconds": event.seconds}
        self._do([Record(row)])
        if self.flow is not None:
            self.flow.checkpoints.published(event.step)
        self._close_if_all_left(now)

    def _close_if_all_left(self, now: float) -> None:
        left = all(member.left for member in self.members.values())
        if self.flow is None or self.state != "running" or not left or self.flow.checkpoints.pending:
            return
        if self._signalled and not self.flow.sequence.finished:
            number = next(iter(self._signalled.values()))
            self._over(Outcome(128 + number, f"stopped by {signal_name(number)}"), messages.Close())
            return
        result = self.flow.results.result(self.config, self.ordered(), self.flow.seconds(now))
        self._over(Outcome(0, "done", result=result), messages.Close())

    def _ticked(self, now: float) -> None:
        if now - self._alive >= ALIVE_EVERY_S and self.members:
            self._alive = now
            self._tell_all(messages.Alive())
        self._fail(self._verdict(now) or self._overdue(now))
        if now >= self._stop_at and self.state != "running" and not self._suspects.any:
            self._stop_early()

    def _verdict(self, now: float) -> Failure | None:
        found = self._suspects.verdict(now, self.members)
        seconds, over = self._last_pause
        if found is None or seconds < self.config.runtime.timeout_s or now - over > 2 * watchdog.GRACE_S:
            return found
        text = f"the coordinator did not run for {seconds:.1f} s, and the workers ended without it ({found.message})"
        return failure(Cause.COORDINATOR_LOST, text)

    def _overdue(self, now: float) -> Failure | None:
        if self.flow is None or self.state != "running":
            return watchdog.late(self.members, self.config, self.state, now - self._since, now)
        found = self.flow.checkpoints.late(self.members, self.config, now)
        return found or watchdog.overdue(self.members, self.flow.window.open, self.config, now)

    # Ends -------------------------------------------------------------------------------------------------------

    def _signal(self, source: str, number: int, now: float) -> None:
        name = signal_name(number)
        if source in self._signalled:
            text = f"stopped at once by a second {name}"
            self._over(Outcome(128 + number, text), messages.Abort(reason=text))
            return
        self._signalled[source] = number
        if self.flow is not None and self.state == "running":
            if len(self._signalled) == 1:
                self._do([Say(f"{name}: writing a checkpoint, then stopping")])
                self.flow.sequence.stop()
                self._feed()
        elif source.startswith("stage ") and len(self._signalled) < self.layout.world:
            # Whoever started the workers ends the others when one dies: its death would be the better reason.
            self._stop_at = min(self._stop_at, now + watchdog.STOP_GRACE_S)
        else:
            self._stop_early()

    def _stop_early(self) -> None:
        number = next(iter(self._signalled.values()))
        text = f"stopped by {signal_name(number)} before the first step"
        self._over(Outcome(128 + number, text), messages.Abort(reason=text))

    def _fail(self, found: Failure | None) -> None:
        if found is None:
            return
        self.nonfinite_losses += found.cause is Cause.NONFINITE
        meaning = MEANING[found.cause]
        last = messages.Abort(reason=found.message[:1000], stacks=meaning.stacks)
        self._over(Outcome(meaning.code, found.cause, found), last)

    def _over(self, outcome: Outcome, last: messages.Abort | messages.Close) -> None:
        if self.outcome is not None:
            return
        self._tell_all(last)
        self._do([Finish(outcome)])
        self.state = "over"
        self.outcome = outcome

    # Commands ---------------------------------------------------------------------------------------------------

    def _tell_all(self, message: Message) -> None:
        self._do([Send(tuple(member.peer for member in self.ordered()), message)])

    def _do(self, found: Iterable[Command | Failure]) -> None:
        """Command something, or fail, with the number of the event behind it; the many rows of steps go without."""
        for command in found:
            if self.outcome is not None:
                return
            if isinstance(command, Failure):
                self._fail(command)
                return
            if isinstance(command, Record) and command.row["event"] != "train":
                command = replace(command, row=command.row | {"event_number": self.number})
            self._commands.append(replace(command, cause=self.number))
