"""Workers that answer the coordinator as real ones do, without processes: they can be killed, hung, added and drained.

Each has what it was told and has not acted on, and what it says and is not heard yet, so that a test decides who is
how far. The items flow from stage to stage as they do in the data plane.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from scpl_dist.control import messages
from scpl_dist.control.items import Checkpoint, Evaluate, Item, Stop, Train
from scpl_dist.control.messages import PROTOCOL, VERSION, Dataset, Message, Stats
from scpl_dist.coordinator import events
from scpl_dist.coordinator.event_log import Origin, plain
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run import partition
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Outcome
from scpl_dist.run.layout import Layout, WorkerId
from scpl_dist.run.phases import Phase
from scpl_dist.run.scores import Sum
from tests.support import invariants
from tests.support.coordinator import SIZES

BLOCKS = 6
WINDOW = 5  # items that stage 0 is ahead: few, so that a run can still be cut near its end
LAST = messages.Abort | messages.Refuse | messages.Close  # after which a worker hears nothing more


class Simulated:
    """One worker; `launched` means that a launcher started it for a rank, and sees its end."""

    def __init__(self, fleet: Fleet, rank: int | None, pid: int, launched: bool, **hello: Any) -> None:
        self.fleet = fleet
        self.peer = b"w%d" % pid
        self.rank, self.pid, self.launched = rank, pid, launched
        self.inbox: deque[Message] = deque()
        self.outbox: deque[Message] = deque()
        self.alive = True
        self.hung = False  # it does nothing any more, and its connection stays
        self.misses: type[Message] | None = None  # as its connection is gone when this comes
        self.heard: list[Message] = []
        self.place: WorkerId | None = None
        self.group = -1
        self.blocks: list[int] = []
        self.running = False
        self.done = -1
        self.seconds: dict[str, float] = {}  # of training, by block
        self.pace: Callable[[int], float] = lambda block: 0.01
        fields: dict[str, Any] = {"protocol": PROTOCOL, "version": VERSION, "torch": "2.14.1"}
        fields |= {"config": fleet.config.digest(), "rank": rank, "host": "here", "pid": pid, "device": "cpu"}
        self.outbox.append(messages.Hello(**fields | {"endpoint": {"pid": pid}} | hello))
        if rank == 0:
            self.outbox.append(messages.Described(data=Dataset(classes=10, sizes=fleet.sizes)))

    @property
    def stage(self) -> int:
        assert self.place is not None
        return self.place.stage

    def turn(self) -> bool:
        """Act on a message, say something or handle an item; False if there is nothing to be done."""
        if not self.alive or self.hung:
            return False
        moves = [self._obey] * bool(self.inbox) + [self._speak] * bool(self.outbox)
        moves += [self._work] * self._has_work()
        if moves:
            self.fleet.random.choice(moves)()
        return bool(moves)

    def beat(self) -> None:
        if self.alive and not self.hung and self.heard:
            self.fleet.hear(self, messages.Heartbeat(group=max(0, self.group), phase=Phase.IDLE))

    def _speak(self) -> None:
        self.fleet.hear(self, self.outbox.popleft())

    def _obey(self) -> None:
        message = self.inbox.popleft()
        match message:
            case messages.Start():
                self.group, self.done = message.group, -1
                self.place = Layout(message.replicas).workers[message.rank]
                counts = message.partition or partition.balanced([1.0] * BLOCKS, len(message.replicas))
                self.blocks = [*partition.split(counts)[self.stage]]
                self.outbox.append(messages.Built(group=self.group, blocks=self.blocks))
            case messages.Join():
                self.outbox.append(messages.Ready(group=self.group))
            case messages.Go():
                self.running = True
            case messages.Work(items=items):
                self.fleet.items.setdefault(self.group, {}).update({item.sequence: item for item in items})
            case messages.Regroup():
                self.running = False
                self.outbox.append(messages.Free(group=self.group, endpoint={"pid": self.pid}))
            case messages.Abort() | messages.Refuse() | messages.Close():
                self.fleet.end(self, 0 if isinstance(message, messages.Close) else 1)

    def _next(self) -> Item | None:
        return self.fleet.items.get(self.group, {}).get(self.done + 1)

    def _has_work(self) -> bool:
        if not self.running or self._next() is None:
            return False
        before = [
            other for other in self.fleet.of_group(self.group) if other.stage == self.stage - 1
        ]  # the dead have sent what they have done
        return self.stage == 0 or all(other.done > self.done for other in before)

    def _work(self) -> None:
        item = self._next()
        assert item is not None
        assert self.place is not None
        self.done = item.sequence
        losses: dict[str, dict[str, float]] = {}
        metrics: dict[str, Sum] = {}
        if isinstance(item, Train):
            losses = {str(block): {"local": 1000.0 * item.step + block} for block in self.blocks}
            for block in self.blocks:
                self.seconds[str(block)] = self.seconds.get(str(block), 0.0) + self.pace(block)
        elif isinstance(item, Evaluate) and self.place.replica == 0:
            (begin, end), *_ = item.micro_batches
            metrics |= {"accuracy": ((begin + item.epoch) % 7, end - begin), "loss": (0.25, end - begin)}
        stats = Stats(begun=item.sequence, blocks=dict(self.seconds))
        said: list[Message] = [
            messages.Done(
                group=self.group, sequence=item.sequence, losses=losses, metrics=metrics, stats=stats
            )
        ]
        if isinstance(item, Checkpoint) and self.place.first:
            part = messages.File(name=f"{self.place.label}.pt", bytes=3, sha256="0" * 64)
            said.append(messages.Written(group=self.group, sequence=item.sequence, files=[part], seconds=0.1))
            self.fleet.random.shuffle(said)
        if isinstance(item, Stop):
            said.append(messages.Left(group=self.group))
            self.running = False
        self.outbox += said


class Fleet:
    """A coordinator, its workers, a launcher that replaces them, and a disk; `seed` is the order of what happens."""

    def __init__(
        self, config: Config, seed: int = 0, sizes: dict[str, int] | None = None, **options: Any
    ) -> None:
        self.config = config
        self.sizes = sizes or SIZES
        self.random = random.Random(seed)
        self.now = 1000.0
        self.coordinator = Coordinator(config, Origin("g1", window=WINDOW, **options))
        self.workers: list[Simulated] = []
        self.items: dict[int, dict[int, Item]] = {}  # that stage 0 has, by group and sequence
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl
        self.repeated = 0  # rows that were dropped, as their steps are trained again
        self.said: list[str] = []
        self.commits: deque[events.Commit] = deque()  # that are not published yet
        self.news: deque[events.Event] = deque()  # what the launcher and the disk have to say
        self.outcome: Outcome | None = None
        self.replaces = True  # whether the launcher does
        self.answers: list[Message] = []  # to who is no worker
        self.commanded: list[str] = []  # all commands, as texts
        self._pids = 100
        for rank in range(config.layout.world):
            self.launch(rank)

    # What happens -----------------------------------------------------------------------------------------------

    def launch(self, rank: int, **hello: Any) -> Simulated:
        return self._worker(rank, True, **hello)

    def join(self, rank: int | None = None, **hello: Any) -> Simulated:
        """A worker comes that nobody has asked for."""
        return self._worker(rank, False, **hello)

    def _worker(self, rank: int | None, launched: bool, **hello: Any) -> Simulated:
        self._pids += 1
        worker = Simulated(self, rank, hello.pop("pid", self._pids), launched, **hello)
        worker.peer = b"w%d" % self._pids
        self.workers.append(worker)
        return worker

    def kill(self, worker: Simulated, code: int = -9) -> None:
        self.end(worker, code)
        for other in self.of_group(worker.group):
            if other.running and other.place and worker.place and abs(other.stage - worker.stage) == 1:
                other.running = False
                report = messages.Failed(
                    group=other.group, cause=Cause.PEER_LOST, message="reset", peer=worker.place.rank
                )
                other.outbox.append(report)

    def end(self, worker: Simulated, code: int) -> None:
        if worker.alive:
            worker.alive = False
            if worker.launched and worker.rank is not None:
                self.news.append(events.Exited(worker.rank, code, worker.pid))

    def raises(self, worker: Simulated, cause: Cause = Cause.RAISED) -> None:
        worker.running = False
        report = messages.Failed(group=max(0, worker.group), cause=cause, message="its own fault")
        worker.outbox.append(report)

    def asks_to_stop(self, worker: Simulated) -> None:
        worker.outbox.append(messages.StopRequested(signal=15))

    def drain(self, stage: int, replica: int = 0) -> Message:
        """The command: what it is answered."""
        before = len(self.answers)
        self.event(events.Received(b"drain", messages.Drain(stage=stage, replica=replica)))
        (answer,) = self.answers[before:]
        return answer

    def publish(self) -> None:
        commit = self.commits.popleft()
        self.event(events.Committed(commit.step, 0, 0.1))

    def hear(self, worker: Simulated, message: Message) -> None:
        self.event(events.Received(worker.peer, message))

    def event(self, event: events.Event) -> None:
        """Hand an event to the coordinator, and do what it commands, as the service does."""
        pending = deque([event])
        while pending:
            commands = self.coordinator.handle(pending.popleft(), self.now)
            invariants.check(self.coordinator)
            for command in commands:
                self.commanded.append(json.dumps(command, default=plain))
                pending.extend(self._execute(command))

    def _execute(self, command: events.Command) -> list[events.Event]:
        assert self.outcome is None, "nothing is commanded after the end"
        match command:
            case events.Send(peers, message):
                return [events.Unreachable(peer, message) for peer in peers if not self._sent(peer, message)]
            case events.Record(row):
                self.rows.append(row)
            case events.Say(text):
                self.said.append(text)
            case events.Rewind(step, epoch):
                stay = [row for row in self.rows if _stays(row, step, epoch)]
                self.repeated += len(self.rows) - len(stay)
                self.rows = stay
            case events.Commit():
                self.commits.append(command)
            case events.Replace(rank, pid):
                if self.replaces:
                    for worker in self.workers:
                        if worker.launched and worker.pid == pid:
                            worker.alive = False
                    self.launch(rank)
            case events.Finish(outcome):
                self.outcome = outcome
        return []

    def _sent(self, peer: bytes, message: Message) -> bool:
        worker = next((one for one in self.workers if one.peer == peer), None)
        if worker is None:
            self.answers.append(message)
            return True
        if worker.misses is type(message):
            worker.misses = None
            return False
        told = [one for one in worker.heard if isinstance(one, LAST)]
        assert not told or isinstance(message, messages.Refuse), f"{message} to a worker that is gone"
        worker.heard.append(message)
        if worker.alive and not isinstance(message, messages.Alive):
            worker.inbox.append(message)
        return worker.alive

    # How it goes on ---------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Let somebody do something; False if nobody can."""
        order = [*self.workers, None]
        self.random.shuffle(order)
        self.now += 0.001
        for one in order:
            if one is not None and one.turn():
                return True
            if one is None and (self.news or self.commits):
                if self.news and (not self.commits or self.random.random() < 0.5):
                    self.event(self.news.popleft())
                else:
                    self.publish()
                return True
        return False

    def wait(self, seconds: float = 0.25) -> None:
        """Let time pass: all who live say so."""
        end = self.now + seconds
        while self.now < end and self.outcome is None:
            self.now += 0.25
            for worker in self.workers:
                if self.outcome is None:
                    worker.beat()
            self.event(events.Tick())

    def until(self, reached: Callable[[Fleet], bool], limit_s: float = 1500.0) -> Fleet:
        """Let all go on until something holds."""
        end, turns = self.now + limit_s, 0
        while not reached(self) and self.outcome is None:
            turns += 1
            if not self.turn() or turns % 200 == 0:
                self.wait()
            assert self.now < end, f"{self.coordinator.state} for ever"
        return self

    def until_step(self, step: int) -> Fleet:
        """Until a loss of that step is recorded."""
        return self.until(lambda fleet: fleet.recorded(step))

    def until_state(self, state: str, group: int = 0) -> Fleet:
        """Until that group, or a later one, is in this state."""
        return self.until(lambda fleet: fleet.coordinator.state == state and fleet.coordinator.group >= group)

    def finish(self) -> Outcome:
        """To the end of the run; nobody is left behind."""
        self.until(lambda fleet: fleet.outcome is not None)
        assert self.outcome is not None
        for worker in self.workers:
            if worker.alive and worker.heard:
                assert any(isinstance(message, LAST) for message in worker.heard), worker.peer
        return self.outcome

    # What came of it --------------------------------------------------------------------------------------------

    def of_group(self, group: int) -> list[Simulated]:
        """All who have been part of it, also those that are dead."""
        return [one for one in self.workers if one.group == group and one.place is not None]

    def at(self, stage: int, replica: int = 0) -> Simulated:
        """The worker that holds a place now."""
        member = self.coordinator.members[self.coordinator.layout.rank(stage, replica)]
        return next(worker for worker in self.workers if worker.peer == member.peer)

    def recorded(self, step: int) -> bool:
        return any(row["event"] == "train" and row["step"] == step for row in self.rows)

    def losses(self) -> list[tuple[int, int, float]]:
        """Step, block and loss of each row, in the order of the steps of each block."""
        rows = [row for row in self.rows if row["event"] == "train"]
        return sorted(((row["step"], row["block"], row["loss"]) for row in rows), key=lambda row: row[1])

    def evaluations(self) -> list[dict[str, Any]]:
        rows = [row for row in self.rows if row["event"] == "eval"]
        return [{key: value for key, value in row.items() if key != "event_number"} for row in rows]

    def numbers(self) -> dict[str, Any]:
        """Of a run that is done: what no disturbance may change."""
        assert self.outcome is not None
        assert self.outcome.result is not None, self.outcome
        names = ("steps", "epochs", "samples", "accuracies", "metrics", "accuracy_best", "best_epoch")
        return {name: self.outcome.result[name] for name in names}

    def events_of(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == name]


def _stays(row: dict[str, Any], step: int, epoch: int) -> bool:
    """As `scpl_dist.storage.metrics_log` has it."""
    if row["event"] in ("train", "checkpoint"):
        return bool(row["step"] < step + (row["event"] == "checkpoint"))
    return bool(row["event"] != "eval" or row["epoch"] < epoch)
