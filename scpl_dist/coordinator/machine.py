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
from collections.abc import Mapping
from typing import Any

from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.messages import (
    Abort,
    Alive,
    Close,
    Dataset,
    Described,
    Done,
    Failed,
    Go,
    Heartbeat,
    Hello,
    Left,
    Message,
    Ready,
    Refuse,
    Report,
    Start,
    StopRequested,
    Work,
    Written,
)
from scpl_dist.coordinator.events import (
    Command,
    Committed,
    Event,
    Exited,
    Finish,
    Garbage,
    LauncherLost,
    NotWritten,
    Received,
    Record,
    Say,
    Send,
    Signal,
    Tick,
    Unreachable,
)
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member, blame, objection
from scpl_dist.coordinator.pending_checkpoints import PendingCheckpoints
from scpl_dist.coordinator.results import Results
from scpl_dist.coordinator.watchdog import (
    PAUSE_S,
    STOP_GRACE_S,
    Suspects,
    exit_text,
    late,
    overdue,
    signal_name,
    unready,
)
from scpl_dist.coordinator.window import WINDOW, Window
from scpl_dist.run.config import Config
from scpl_dist.run.failures import ADVICE, UNCLEAR, Failure, Outcome

ALIVE_EVERY_S = 1.0
REFUSALS = 20  # that are reported; more are counted only, so that a stranger cannot fill the disk


class Coordinator:
    """Schedules and watches one generation of a run.

    Args:
        config: the run.
        generation: unique name of this start of the run.
        window: most items that are sent to stage 0 and not yet begun by it.
        resume: the "position" of a checkpoint's manifest.
        restore: what the workers are told of that checkpoint.
        folder: run folder, for workers that do not know it.
    """

    def __init__(
        self,
        config: Config,
        generation: str,
        window: int = WINDOW,
        resume: Mapping[str, Any] | None = None,
        restore: dict[str, Any] | None = None,
        folder: str = "",
    ) -> None:
        self.config = config
        self.generation = generation
        self.layout = config.layout
        self.state = "gathering"
        self.members: dict[int, Member] = {}
        self.agenda: ItemSequence | None = None
        self.tally: Results | None = None
        self.data: Dataset | None = None
        self.rejected: Counter[str] = Counter(dict.fromkeys(("garbage", "refused", "key", "handshake"), 0))
        self.nonfinite_losses = self.checkpoints = self.checkpoint_failures = 0
        self.last_commit: Committed | None = None
        self.committed_at: float | None = None
        self.outcome: Outcome | None = None
        self.started: float | None = None  # monotonic time of the first item
        self._supply: Window | None = None
        self._cuts = PendingCheckpoints(config.pipeline.stages)
        self._window, self._folder = window, folder
        self._resume, self._restore = resume, restore
        self._since: float | None = None  # when the present state began
        self._tick: float | None = None
        self._suspects = Suspects(config.layout)
        self._signalled: dict[str, int] = {}
        self._stop_at, self._alive = math.inf, -math.inf
        self._refused: set[bytes] = set()
        self._commands: list[Command] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        """React to one event.

        Args:
            event: what happened.
            now: monotonic seconds.

        Returns:
            What to do, in order; empty once the run is over.
        """
        if self.outcome is not None:
            return []
        self._since = now if self._since is None else self._since
        match event:
            case Received(peer, message):
                self._received(peer, message, now)
            case Tick():
                self._ticked(now)
            case Exited(rank, code):
                self._exited(rank, code, now)
            case Unreachable(peer):
                member = next((m for m in self.members.values() if m.peer == peer), None)
                if member is not None and not member.left:
                    self._suspects.add(member.hello.rank, now, "unreachable", "its connection is gone")
            case Signal(source, number):
                self._signal(source, number, now)
            case LauncherLost():
                self._fail(Failure("launcher_lost", "the launcher is gone", ADVICE["launcher_lost"]))
            case Garbage():
                self.rejected["garbage"] += 1
            case TurnedAway(reason, report):
                self.rejected[reason] += 1
                if report is not None:
                    self._warn(report)
            case Committed():
                self.checkpoints += 1
                self.last_commit, self.committed_at = event, now
                self._commands.append(Record(event.row()))
                self._cuts.published(event.step)
                self._close_if_all_left(now)
            case NotWritten(what, text):
                self.checkpoint_failures += what == "checkpoint"
                self._fail(Failure("disk", f"{what} could not be written: {text}", ADVICE["disk"]))
        commands, self._commands = self._commands, []
        return commands

    def unready(self, now: float) -> str | None:
        """Why the run is not making progress, or None if it is."""
        return unready(self.members.values(), self.config, self.state, now)

    def ordered(self) -> list[Member]:
        """The members by stage and replica."""
        return sorted(self.members.values(), key=lambda member: member.place)

    def _received(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        place = (message.stage, message.replica) if isinstance(message, Report) else (-1, -1)
        member = self.members.get(self.layout.rank(*place))
        if member is None or member.peer != peer:
            if peer not in self._refused:  # a refused worker may still send a heartbeat
                self.rejected["garbage"] += 1
            return
        member.heard = now
        self._suspects.clear(member.hello.rank)
        match message:
            case Described() if self.data is None:
                self.data = message.data
                self._start(now)
            case Ready():
                member.ready, member.blocks, member.changed = True, message.blocks, now
                if self.state == "preparing" and all(m.ready for m in self.members.values()):
                    self._stop_early() if self._signalled else self._go(now)
            case Heartbeat():
                member.beat(message, now)
                if member.stage == 0:
                    self._feed()
            case Done():
                self._done(member, message, now)
            case Failed(cause="peer_lost"):
                self._suspects.accuse(member, message, now)
            case Failed():
                self.nonfinite_losses += message.cause == "nonfinite"
                self._fail(blame(member, message.cause, message.message, report=message))
            case Written():
                self.rejected["garbage"] += not self._cuts.written(message)
                self._commands += self._cuts.take(now)
            case StopRequested() if not self._suspects.any:  # when one has died, the launcher ends the others
                self._signal(member.name, message.signal, now)
            case Left():
                member.left = True
                self._close_if_all_left(now)

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        reason = objection(hello, self.members, self.config)
        rank = self.layout.rank(hello.stage, hello.replica)
        if reason is None:
            self.members[rank] = Member(peer, hello, heard=now, changed=now)
            self.data = hello.data or self.data
            self._start(now)
            return
        self.rejected["refused"] += 1
        self._send(Refuse(reason=reason), peer)
        text = f"refused rank {hello.rank} (stage {hello.stage}, pid {hello.pid} on {hello.host}): {reason}"
        if self.rejected["refused"] <= REFUSALS:
            self._refused.add(peer)
            self._warn(text, hello.stage)
        if rank >= 0 and rank not in self.members:
            self._fail(blame(Member(peer, hello, now, now), "config", text))

    def _start(self, now: float) -> None:
        """Start once all workers have joined and the data set is read."""
        if len(self.members) < self.layout.world:
            return
        if self.data is None:
            self.state, self._since = "loading", now
            return
        try:
            self.agenda = ItemSequence(self.config, self.data.sizes, self._resume)
        except ValueError as error:
            self._fail(Failure("config", str(error), ADVICE["config"]))
            return
        self._cuts.agenda = self.agenda
        self._supply = Window(self.agenda, self.generation, self._window)
        self.tally = Results(self.agenda, self.config.pipeline.stages, self._resume)
        self.state, self._since = "preparing", now
        start = Start(generation=self.generation, data=self.data.model_dump(), restore=self._restore)
        endpoints = [self.members[worker_id.rank].hello.endpoint for worker_id in self.layout.workers]
        self._send(start.model_copy(update={"endpoints": endpoints, "folder": self._folder}))

    def _go(self, now: float) -> None:
        assert self.tally is not None
        self.state, self.started = "running", now
        for member in self.members.values():
            member.changed = now
        row, text = self.tally.opening(self.config)
        self._commands += [Record(row | {"generation": self.generation}), Say(text)]
        self._send(Go())
        self._feed()

    def _feed(self) -> None:
        """Keep stage 0 supplied, all its workers with the same items."""
        if self.state != "running" or self._supply is None:
            return
        feeding = [member for member in self.members.values() if member.stage == 0]
        begun = min(max(member.stats.begun, member.done) for member in feeding)
        items = self._supply.take(begun, rest=bool(self._signalled))
        if items:
            self._send(Work(items=items), *(member.peer for member in feeding))

    def _done(self, member: Member, message: Done, now: float) -> None:
        item = self._supply.open.get(message.sequence) if self._supply is not None else None
        if item is None or message.sequence != member.done + 1 or message.kind != item["kind"]:
            text = f"{member.name} finished item {message.sequence} ({message.kind}) after item {member.done}"
            self._fail(blame(member, "protocol", f"{text}: a message was lost or invented"))
            return
        assert self.tally is not None
        assert self._supply is not None
        self.tally.finished(message, member.done_busy, now)
        if member.place == (0, 0):
            self._supply.finished(now)
        member.finish(message, item, now)
        rows, problem = self.tally.losses(member, message, item)
        self._commands += [Record(row) for row in rows]
        if problem is not None:
            self.nonfinite_losses += 1
            self._fail(blame(member, "nonfinite", problem))
            return
        if message.kind == "checkpoint" and member.first:
            self._cuts.copied(message, now)
        for done in self._supply.complete(min(other.done for other in self.members.values())):
            self._completed(done, now)
        if member.stage == 0:
            self._feed()

    def _completed(self, item: Mapping[str, Any], now: float) -> None:
        """All stages have finished this item."""
        assert self.tally is not None
        if item["kind"] == "train":
            for stage, text in self.tally.stragglers(item["sequence"], self.members.values()):
                self._warn(text, stage)
        elif item["kind"] == "evaluate" and item["last"]:
            row = self.tally.evaluated(item["epoch"], item["split"])
            if row is not None:
                self._commands.append(Record(row))
            if item["split"] == self.tally.last_split:
                self._commands.append(Say(self.tally.line(item["epoch"], self.config.run.epochs)))
        elif item["kind"] == "checkpoint":
            self._cuts.complete(item["sequence"], self.tally.commit(item, self._running(now)))
            self._commands += self._cuts.take(now)

    def _exited(self, rank: int, code: int, now: float) -> None:
        member = self.members.get(rank)
        if member is not None and (member.left or (code == 0 and "stop" in member.kinds)):
            member.left = True
            self._close_if_all_left(now)
            return
        if -code in (signals.SIGTERM, signals.SIGINT) and self.state != "running" and not self._suspects.any:
            self._signal(f"rank {rank}", -code, now)  # it was still loading and could not ask
            return
        self._suspects.add(rank, now, "exited", exit_text(code))

    def _signal(self, source: str, number: int, now: float) -> None:
        name = signal_name(number)
        if source in self._signalled:
            text = f"stopped at once by a second {name}"
            self._over(Outcome(128 + number, text), Abort(reason=text))
            return
        self._signalled[source] = number
        if self.state == "running" and self.agenda is not None:
            if len(self._signalled) == 1:
                self._commands.append(Say(f"{name}: writing a checkpoint, then stopping"))
                self.agenda.stop()
                self._feed()
        elif source.startswith("stage ") and len(self._signalled) < self.layout.world:
            # Whoever started the workers ends the others when one dies: its death would be the better reason.
            self._stop_at = min(self._stop_at, now + STOP_GRACE_S)
        else:
            self._stop_early()

    def _stop_early(self) -> None:
        text = (
            f"stopped by {signal_name(number := next(iter(self._signalled.values())))} before the first step"
        )
        self._over(Outcome(128 + number, text), Abort(reason=text))

    def _close_if_all_left(self, now: float) -> None:
        left = all(member.left for member in self.members.values())
        if self.state != "running" or not left or self._cuts.pending:
            return
        assert self.agenda is not None
        assert self.tally is not None
        position = self.agenda.position
        if self._signalled and position["epoch"] < self.config.run.epochs:
            number = next(iter(self._signalled.values()))
            self._over(Outcome(128 + number, f"stopped by {signal_name(number)}"), Close())
            return
        result = self.tally.result(self.config, self.ordered(), self._running(now))
        self._over(Outcome(0, "done", result=result), Close())

    def _ticked(self, now: float) -> None:
        assert self._since is not None
        pause, self._tick = now - (now if self._tick is None else self._tick), now
        if pause > PAUSE_S:
            self._since += pause
            for member in self.members.values():
                member.forgive(pause)
        if now - self._alive >= ALIVE_EVERY_S and self.members:
            self._alive = now
            self._send(Alive())
        failure = self._suspects.verdict(now, self.members)
        if failure is None and self._supply is not None and self.state == "running":
            failure = self._cuts.late(self.members, self.config, now)
            failure = failure or overdue(self.ordered(), self._supply.open, self.config, now)
        elif failure is None:
            failure = late(self.members, self.config, self.state, now - self._since, now)
        if failure is not None:
            self._fail(failure)
        elif now >= self._stop_at and self.state != "running" and not self._suspects.any:
            self._stop_early()

    def _running(self, now: float) -> float:
        return now - self.started if self.started is not None else 0.0

    def _send(self, message: Message, *peers: bytes) -> None:
        self._commands.append(Send(peers or tuple(member.peer for member in self.ordered()), message))

    def _warn(self, text: str, stage: int | None = None) -> None:
        self._commands += [Say(text, "warning"), Record({"event": "warning", "stage": stage, "text": text})]

    def _fail(self, failure: Failure) -> None:
        code = 2 if failure.cause == "config" else 1
        last = Abort(reason=failure.message[:1000], stacks=failure.cause in UNCLEAR)
        self._over(Outcome(code, failure.cause, failure), last)

    def _over(self, outcome: Outcome, last: Abort | Close) -> None:
        if self.outcome is None:
            self.state, self.outcome = "over", outcome
            self._send(last)
            self._commands.append(Finish(outcome))
