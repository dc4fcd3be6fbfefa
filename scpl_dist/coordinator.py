"""The coordinator: a pure state machine that schedules the items of a run and watches the stages.

    gathering --all said hello--> preparing --all ready--> running --all left--> over
         \\________________________\\__________________________\\___failure, signal___/

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

from scpl_dist.agenda import Agenda
from scpl_dist.config import Config
from scpl_dist.events import (
    PROTOCOL,
    VERSION,
    Abort,
    Alive,
    Close,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Dataset,
    Done,
    Event,
    Exited,
    Failed,
    Failure,
    Finish,
    Garbage,
    Go,
    Heartbeat,
    Hello,
    LauncherLost,
    Left,
    Outcome,
    Ready,
    Received,
    Record,
    Refuse,
    Say,
    Send,
    Signal,
    Start,
    StopRequested,
    Tick,
    Unreachable,
    Work,
)
from scpl_dist.roster import Member, Suspects, blame, overdue
from scpl_dist.tally import Tally

__all__ = ["Coordinator"]

ALIVE_EVERY_S = 1.0
PAUSE_S = 5.0
"""A longer time between two ticks means that the coordinator itself was stopped: no stage is to blame for it."""
ADVICE = {
    "raised": "read the traceback; it comes from the model, the loss or the data of this stage",
    "nonfinite": "lower optimizer.lr, or check the data for NaN and Inf; the last checkpoint is unharmed",
    "out_of_memory": "lower data.batch_size or pipeline.max_in_flight, or give this stage fewer blocks",
    "disk": "free some space or choose another --run-dir, then resume; the last checkpoint is unharmed",
    "config": "correct the configuration; all processes need the same",
}


class Coordinator:
    """Schedules and watches one generation of a run.

    Args:
        config: the run.
        generation: unique name of this start of the run.
        window: items that may be sent to stage 0 and not yet begun by it.
        resume: the "position" of a checkpoint's manifest.
        restore: what the workers are told of that checkpoint.
    """

    def __init__(
        self,
        config: Config,
        generation: str,
        window: int = 8,
        resume: Mapping[str, Any] | None = None,
        restore: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.generation = generation
        self.state = "gathering"
        self.members: dict[int, Member] = {}
        self.agenda: Agenda | None = None
        self.tally: Tally | None = None
        self.data: Dataset | None = None
        self.rejected: Counter[str] = Counter(garbage=0, refused=0)
        self.nonfinite_losses = 0
        self.checkpoints = 0
        self.checkpoint_failures = 0
        self.last_commit: Committed | None = None
        self.outcome: Outcome | None = None
        self.started: float | None = None
        """Monotonic time of the first item."""
        self._window = window
        self._resume = resume
        self._restore = restore
        self._since: float | None = None
        self._tick: float | None = None
        self._alive = -math.inf
        self._items: dict[int, dict[str, Any]] = {}
        self._files: dict[int, list[dict[str, Any]]] = {}
        self._write_seconds = 0.0
        self._sent = 0
        self._begun = -1
        self._complete = 0
        self._suspects = Suspects()
        self._signalled: dict[str, int] = {}
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
        if self._since is None:
            self._since = now
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
                    self._suspects.add(member.stage, now, "its connection is gone", "unreachable")
            case Signal(source, number):
                self._signal(source, number, now)
            case LauncherLost():
                advice = "its process was killed; resume the run"
                self._fail(Failure("launcher_lost", "the launcher is gone", advice))
            case Garbage():
                self.rejected["garbage"] += 1
            case Committed():
                self.checkpoints += 1
                self.last_commit = event
                row = {
                    "event": "checkpoint",
                    "step": event.step,
                    "bytes": event.bytes,
                    "seconds": event.seconds,
                }
                self._commands.append(Record(row))
            case CommitFailed(step, text):
                self.checkpoint_failures += 1
                text = f"the checkpoint of step {step} could not be published: {text}"
                self._fail(Failure("disk", text, ADVICE["disk"], step=step))
        commands, self._commands = self._commands, []
        return commands

    def unready(self, now: float) -> str | None:
        """Why the run is not making progress, or None if it is."""
        if self.state != "running":
            return f"{len(self.members)} of {self.config.pipeline.stages} stages have joined; the run is {self.state}"
        still = now - max(member.changed for member in self.members.values())
        if still > self.config.runtime.timeout_s:
            return f"no stage has made progress for {still:.0f} s"
        return None

    def _received(self, peer: bytes, message: object, now: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        member = self.members.get(getattr(message, "stage", -1))
        if member is None or member.peer != peer:
            if peer not in self._refused:  # a refused worker may still send a heartbeat
                self.rejected["garbage"] += 1
            return
        member.heard = now
        self._suspects.clear(member.stage)
        match message:
            case Ready():
                member.ready, member.blocks, member.changed = True, message.blocks, now
                if self.state == "preparing" and all(m.ready for m in self.members.values()):
                    self._go(now)
            case Heartbeat():
                member.beat(message, now)
                self._feed(member)
            case Done():
                self._done(member, message, now)
            case Failed():
                self._failed(member, message, now)
            case StopRequested():
                self._signal(f"stage {member.stage}", message.signal, now)
            case Left():
                member.left = True
                self._close_if_all_left(now)
            case _:
                self.rejected["garbage"] += 1

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        reason = self._objection(hello)
        if reason is None:
            self.members[hello.stage] = Member(peer, hello, heard=now, changed=now)
            self.data = hello.data or self.data
            if len(self.members) == self.config.pipeline.stages:
                self._start(now)
            return
        self.rejected["refused"] += 1
        self._refused.add(peer)
        text = f"refused rank {hello.rank} (stage {hello.stage}, pid {hello.pid} on {hello.host}): {reason}"
        self._send(Refuse(reason=reason), peer)
        self._warn(text, stage=hello.stage)
        if hello.stage < self.config.pipeline.stages and hello.stage not in self.members:
            failure = blame(Member(peer, hello, heard=now, changed=now), "config", text, ADVICE["config"])
            self._fail(failure)

    def _objection(self, hello: Hello) -> str | None:
        """Why this worker cannot take part, with both values."""
        first = next(iter(self.members.values()), None)
        torch = first.hello.torch if first else hello.torch
        pairs = [
            ("protocol", hello.protocol, PROTOCOL),
            ("scpl_dist version", hello.version, VERSION),
            ("torch version", hello.torch, torch),
            ("pipeline.stages", hello.stages, self.config.pipeline.stages),
            ("configuration digest", hello.config, self.config.digest()),
        ]
        for name, theirs, ours in pairs:
            if theirs != ours:
                return f"{name} of this worker is {theirs}, the run has {ours}"
        if hello.stage >= self.config.pipeline.stages:
            return f"stage {hello.stage} does not exist, the run has {self.config.pipeline.stages} stages"
        if hello.stage in self.members:
            there = self.members[hello.stage].hello
            return f"stage {hello.stage} is taken by rank {there.rank} (pid {there.pid} on {there.host})"
        if hello.stage == 0 and hello.data is None:
            return "stage 0 must say what its data set is, but its hello has no data"
        return None

    def _start(self, now: float) -> None:
        assert self.data is not None
        try:
            self.agenda = Agenda(self.config, self.data.sizes, self._resume)
        except ValueError as error:
            self._fail(Failure("config", str(error), ADVICE["config"]))
            return
        done = self.agenda.position["step"]
        last = self.config.pipeline.stages - 1
        self.tally = Tally(self.agenda.steps - done, last, self._resume)
        self.state, self._since = "preparing", now
        restore = dict(self._restore) if self._restore is not None else None
        data = self.data.model_dump()
        self._send(Start(generation=self.generation, data=data, restore=restore))

    def _go(self, now: float) -> None:
        assert self.agenda is not None
        self.state, self.started = "running", now
        for member in self.members.values():
            member.changed = now
        config, done = self.config, self.agenda.position["step"]
        row = {"event": "start", "generation": self.generation, "method": config.run.method, "step": done}
        self._commands.append(Record(row | {"stages": config.pipeline.stages, "steps": self.agenda.steps}))
        text = f"{config.run.method}: {config.pipeline.stages} stages, {config.run.epochs} epochs, {self.agenda.steps} steps"
        self._commands.append(Say(text + (f", resumed at step {done}" if done else "")))
        self._send(Go())
        self._feed(self.members[0])

    def _feed(self, member: Member) -> None:
        """Keep stage 0 supplied: `window` items that it has not begun yet."""
        if member.stage != 0 or self.state != "running" or self.agenda is None:
            return
        self._begun = max(self._begun, member.stats.begun, member.done)
        items = []
        while self._signalled or self._sent - 1 - self._begun < self._window:
            item = self.agenda.next()
            if item is None:
                break
            self._items[item["sequence"]] = item
            self._sent += 1
            items.append(item)
        if items:
            self._send(Work(items=items), member.peer)

    def _done(self, member: Member, message: Done, now: float) -> None:
        item = self._items.get(message.sequence)
        if item is None or message.sequence != member.done + 1 or message.kind != item["kind"]:
            text = f"stage {member.stage} reported item {message.sequence} ({message.kind}) after item {member.done}"
            self._fail(blame(member, "protocol", text, "this is a bug of scpl_dist: please report it"))
            return
        assert self.tally is not None
        before = member.done_busy
        member.finish(message, item, now)
        self.tally.finished(message, before, now)
        if message.losses and not self._losses(member, message, item):
            return
        if message.files is not None:
            files = [file.model_dump() | {"stage": member.stage} for file in message.files]
            self._files.setdefault(message.sequence, []).extend(files)
            self._write_seconds = max(self._write_seconds, message.seconds or 0.0)
        while self._complete <= min(other.done for other in self.members.values()):
            self._completed(self._items.pop(self._complete), now)
            self._complete += 1
        self._feed(member)

    def _losses(self, member: Member, message: Done, item: Mapping[str, Any]) -> bool:
        assert self.tally is not None
        self.tally.learning_rate = item.get("lr", self.tally.learning_rate)
        for block, terms in (message.losses or {}).items():
            loss = sum(terms.values())
            if not math.isfinite(loss):
                self.nonfinite_losses += 1
                text = f"the loss of block {block} is {loss} ({terms})"
                self._fail(blame(member, "nonfinite", text, ADVICE["nonfinite"]))
                return False
            member.losses[block] = loss
            row = {"event": "train", "step": item.get("step"), "epoch": item["epoch"], "stage": member.stage}
            row |= {"block": int(block) if block.isdecimal() else block, "loss": loss, "terms": terms}
            self._commands.append(Record(row | {"lr": item.get("lr")}))
        return True

    def _completed(self, item: Mapping[str, Any], now: float) -> None:
        """All stages have finished this item."""
        assert self.tally is not None
        if item["kind"] == "train":
            for member, seconds, median in self.tally.stragglers(item["sequence"], self.members.values()):
                text = (
                    f"stage {member.stage} on {member.hello.host} holds the others back: {seconds:.4f} s of work in "
                    f'a step, median {median:.4f} s; try pipeline.partition = "measured"'
                )
                self._warn(text, stage=member.stage)
        elif item["kind"] == "evaluate" and item["last"]:
            row = self.tally.evaluated(item["epoch"], item["split"])
            if row is not None:
                self._commands.append(Record(row))
                text = f"epoch {item['epoch']}: {item['split']} accuracy {row['accuracy']:.4f}"
                self._commands.append(Say(text))
        elif item["kind"] == "checkpoint":
            self._commands.append(self._commit(item, now))

    def _commit(self, item: Mapping[str, Any], now: float) -> Commit:
        assert self.tally is not None
        assert self.agenda is not None
        step, best = item["step"], self.tally.best_epoch
        position = dict(item["position"]) | {
            "accuracies": self.tally.history(),
            "samples": self.tally.samples,
            "seconds": self.tally.earlier_seconds + self._running(now),
        }
        files = sorted(self._files.pop(item["sequence"], []), key=lambda file: (file["stage"], file["name"]))
        seconds, self._write_seconds = self._write_seconds, 0.0
        is_best = best is not None and step == (best + 1) * self.agenda.steps_per_epoch
        return Commit(step, item["epoch"], position, files, is_best, seconds)

    def _failed(self, member: Member, report: Failed, now: float) -> None:
        if report.cause == "peer_lost":
            # The neighbour may have told us more, or may yet do so: its own report is the root cause.
            accused = report.peer if report.peer is not None else member.stage
            self._suspects.report(member.stage)
            text = f"stage {member.stage} lost it: {report.message}"
            self._suspects.add(accused, now, text, "accused")
            return
        self.nonfinite_losses += report.cause == "nonfinite"
        self._fail(blame(member, report.cause, report.message, ADVICE[report.cause], report))

    def _exited(self, rank: int, code: int, now: float) -> None:
        member = next((m for m in self.members.values() if m.hello.rank == rank), None)
        if member is not None and (member.left or (code == 0 and "stop" in member.kinds)):
            if code != 0:
                self._warn(
                    f"stage {member.stage} ended with code {code} after its work was done", stage=member.stage
                )
            member.left = True
            self._close_if_all_left(now)
            return
        how = f"killed by {_name(-code)}" if code < 0 else f"exit code {code}"
        self._suspects.add(member.stage if member else rank, now, how, "exited")

    def _signal(self, source: str, number: int, now: float) -> None:
        name = _name(number)
        if source in self._signalled:
            self._over(
                Outcome(128 + number, f"stopped at once by a second {name}"), Abort(reason=f"second {name}")
            )
            return
        self._signalled[source] = number
        if self.state != "running" or self.agenda is None:
            reason = f"stopped by {name} before the first step"
            self._over(Outcome(128 + number, reason), Abort(reason=reason))
        elif len(self._signalled) == 1:
            self._commands.append(Say(f"{name}: writing a checkpoint, then stopping"))
            self.agenda.stop()
            self._feed(self.members[0])

    def _close_if_all_left(self, now: float) -> None:
        if self.state != "running" or not all(member.left for member in self.members.values()):
            return
        assert self.agenda is not None
        assert self.tally is not None
        position = self.agenda.position
        if self._signalled and position["epoch"] < self.config.run.epochs:
            number = next(iter(self._signalled.values()))
            self._over(Outcome(128 + number, f"stopped by {_name(number)}"), Close())
            return
        config = self.config
        result = {"method": config.run.method, "stages": config.pipeline.stages}
        result |= {"steps": position["step"], "epochs": position["epoch"]}
        result |= self.tally.result(self.ordered(), self._running(now))
        self._over(Outcome(0, "done", result=result), Close())

    def _ticked(self, now: float) -> None:
        if self._tick is not None and now - self._tick > PAUSE_S:
            self._forgive(now - self._tick)
        self._tick = now
        if now - self._alive >= ALIVE_EVERY_S and self.members:
            self._alive = now
            self._send(Alive())
        failure = self._suspects.verdict(now, self.members) or self._late(now)
        if failure is not None:
            self._fail(failure)

    def _late(self, now: float) -> Failure | None:
        assert self._since is not None
        waited, limits = now - self._since, self.config.runtime
        if self.state == "running":
            return overdue(self.ordered(), self._items, self.config, now)
        if self.state == "gathering" and waited >= limits.timeout_s:
            missing = [k for k in range(self.config.pipeline.stages) if k not in self.members]
            text = f"no worker for stage {', '.join(map(str, missing))} within {limits.timeout_s:g} s"
            return Failure(
                "missing", text, "start all workers, and check that they reach the coordinator's address"
            )
        if self.state == "preparing" and waited >= limits.first_step_timeout_s:
            slow = [member for member in self.ordered() if not member.ready]
            names = ", ".join(str(member.stage) for member in slow)
            text = f"stage {names} not ready within {limits.first_step_timeout_s:g} s"
            return blame(slow[0], "missing", text, "raise runtime.first_step_timeout_s, or look into the log")
        return None

    def ordered(self) -> list[Member]:
        """The members by stage."""
        return [self.members[stage] for stage in sorted(self.members)]

    def _forgive(self, pause: float) -> None:
        self._since = (self._since or 0.0) + pause
        for member in self.members.values():
            member.heard += pause
            member.changed += pause

    def _running(self, now: float) -> float:
        return now - self.started if self.started is not None else 0.0

    def _send(self, message: Refuse | Start | Go | Work | Abort | Alive | Close, *peers: bytes) -> None:
        self._commands.append(Send(peers or tuple(member.peer for member in self.ordered()), message))

    def _warn(self, text: str, stage: int | None = None) -> None:
        self._commands += [Say(text, "warning"), Record({"event": "warning", "stage": stage, "text": text})]

    def _fail(self, failure: Failure) -> None:
        code = 2 if failure.cause == "config" else 1
        self._over(Outcome(code, failure.cause, failure), Abort(reason=failure.message[:1000]))

    def _over(self, outcome: Outcome, last: Abort | Close) -> None:
        if self.outcome is None:
            self.state, self.outcome = "over", outcome
            self._send(last)
            self._commands.append(Finish(outcome))


def _name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
