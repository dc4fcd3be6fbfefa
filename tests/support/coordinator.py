"""A coordinator with workers that do what a test tells them, on a clock that is a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from scpl_dist.control.items import Checkpoint, Evaluate, Item, Train
from scpl_dist.control.messages import (
    PROTOCOL,
    VERSION,
    Built,
    Dataset,
    Described,
    Done,
    File,
    Heartbeat,
    Hello,
    Left,
    Message,
    Ready,
    Stats,
    Work,
    Written,
)
from scpl_dist.coordinator.event_log import Origin
from scpl_dist.coordinator.events import (
    Command,
    Commit,
    Committed,
    Event,
    Exited,
    Finish,
    Received,
    Record,
    Say,
    Send,
    Tick,
)
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Failure, Outcome
from scpl_dist.run.phases import Phase
from scpl_dist.run.scores import Sum
from tests.support import invariants

M = TypeVar("M", bound=Message)
T = TypeVar("T")
ItemType = TypeVar("ItemType", bound=Item)
SIZES = {"train": 50, "validation": 30, "test": 20}


def small(**values: Any) -> Config:
    named = {key.replace("__", "."): value for key, value in values.items()}
    settings: dict[str, Any] = {"checkpoint.best": False, "runtime.max_restarts": 0}
    settings |= {"run.epochs": 3, "data.batch_size": 20, "pipeline.stages": 3, "runtime.timeout_s": 10.0}
    return configuration.load(values=settings | {"runtime.first_step_timeout_s": 100.0} | named)


class Run:
    """A coordinator, whose invariants are checked after every event, a clock, and everything that it commanded."""

    def __init__(
        self, config: Config | None = None, sizes: dict[str, int] | None = None, **options: Any
    ) -> None:
        self.config = config or small()
        self.sizes = sizes or SIZES
        self.coordinator = Coordinator(self.config, Origin("g1", **options))
        self.now = 1000.0
        self.commands: list[Command] = []
        self.stages = range(self.config.pipeline.stages)
        self.places = [(worker.stage, worker.replica) for worker in self.config.layout.workers]
        self.busy = dict.fromkeys(self.stages, 0.0)
        self.fast_disks = False  # whether a checkpoint is written before its stage reports the item
        self._finished = dict.fromkeys(self.places, 0)

    def event(self, event: Event) -> list[Command]:
        found = self.coordinator.handle(event, self.now)
        invariants.check(self.coordinator)
        assert all(command.cause == self.coordinator.number for command in found)
        self.commands += found
        return found

    # What the workers say ---------------------------------------------------------------------------------------

    def tell(self, stage: int, message: Message, replica: int = 0) -> list[Command]:
        return self.event(Received(peer_of(stage, replica), message))

    def hello(
        self,
        stage: int,
        replica: int = 0,
        peer: bytes | None = None,
        described: bool = True,
        **changes: Any,
    ) -> list[Command]:
        """A worker joins; the first one of stage 0 describes the data set at once."""
        rank = self.config.layout.rank(stage, replica)
        rank = rank if rank >= 0 else 90 + stage  # of a worker that should not be there
        fields: dict[str, Any] = {"protocol": PROTOCOL, "version": VERSION, "torch": "2.14.1"}
        fields |= {"config": self.config.digest(), "device": "cpu"}
        fields |= {"rank": rank, "host": f"host{rank}", "pid": pid_of(rank)}
        fields |= {"endpoint": {"rank": rank}}
        found = self.event(Received(peer or peer_of(stage, replica), Hello(**fields | changes)))
        if (stage, replica) == (0, 0) and described:
            found = found + self.describe()
        return found

    def describe(self) -> list[Command]:
        return self.tell(0, Described(data=Dataset(classes=10, sizes=self.sizes)))

    def start(self) -> Run:
        for stage, replica in reversed(self.places):  # any order does
            self.hello(stage, replica)
        return self.ready()

    def ready(self) -> Run:
        """All build their blocks, connect and are ready."""
        for message in (Built(blocks=[0]), Ready()):
            for stage, replica in self.places:
                self.tell(stage, message, replica)
        return self

    def beat(self, stage: int, phase: Phase = Phase.FORWARD, **fields: Any) -> list[Command]:
        return self.tell(stage, Heartbeat(phase=phase, **fields))

    def done(self, stage: int, replica: int = 0, **changes: Any) -> list[Command]:
        """Let a worker finish its next item."""
        item = self.items()[self._finished[stage, replica]]
        self._finished[stage, replica] += 1
        fields: dict[str, Any] = {"sequence": item.sequence, "stats": self.stats(item, stage, replica)}
        if isinstance(item, Train):
            fields["losses"] = {str(stage): {"local": 1.0 + stage}}
        elif isinstance(item, Evaluate) and stage == self.stages[-1]:
            fields["metrics"] = self.answers(item, replica)
        reports: list[Message] = [Done(**fields | changes)]
        if isinstance(item, Checkpoint) and replica == 0:
            part = File(name=f"block-{stage:03d}.pt", bytes=3, sha256="0" * 64)
            reports.append(Written(sequence=item.sequence, files=[part], seconds=1.0 + stage))
        if self.fast_disks:
            reports.reverse()
        return [command for report in reports for command in self.tell(stage, report, replica)]

    def stats(self, item: Item, stage: int, replica: int) -> Stats:
        blocks = {str(stage): self.busy[stage]}
        return Stats(busy=self.busy[stage], begun=item.sequence, blocks=blocks)

    def answers(self, item: Evaluate, replica: int) -> dict[str, Sum]:
        """What the last stage counts of an evaluation's batch."""
        begin, end = item.micro_batches[0]
        return {"accuracy": ((end - begin) // 2, end - begin), "loss": (0.25 * (end - begin), end - begin)}

    def play(self, until: Callable[[Item], bool] = lambda item: False) -> Run:
        """Let all workers finish item after item, 1 s each, up to and with the first for which `until` holds."""
        while (item := self.next_item) is not None:
            self.now += 1.0
            for stage, replica in self.places:
                self.done(stage, replica)
            if until(item):
                break
        return self

    def leave(self) -> Run:
        self.publish()
        for stage, replica in self.places:
            self.tell(stage, Left(), replica)
        return self

    # What else happens ------------------------------------------------------------------------------------------

    def exited(self, rank: int, code: int) -> list[Command]:
        """The launcher saw the end of the worker that it started for a rank."""
        return self.event(Exited(rank, code, pid_of(rank)))

    def publish(self) -> Run:
        for commit in self.only(Commit):
            self.event(Committed(commit.step, 0, 0.0))
        return self

    def pass_time(self, seconds: float, beating: Iterable[int] = (), phase: Phase = Phase.FORWARD) -> None:
        """Tick 4 times a second, with a heartbeat of these stages at each."""
        end = self.now + seconds
        while self.now < end and self.outcome is None:
            self.now += 0.25
            for stage in beating:
                self.beat(stage, phase)
            self.event(Tick())

    # What the coordinator wants ---------------------------------------------------------------------------------

    def only(self, kind: type[T]) -> list[T]:
        return [command for command in self.commands if isinstance(command, kind)]

    def sends(self, kind: type[Message]) -> list[Send]:
        return [send for send in self.only(Send) if isinstance(send.message, kind)]

    def sent(self, kind: type[M]) -> list[M]:
        return [send.message for send in self.only(Send) if isinstance(send.message, kind)]

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return [record.row for record in self.only(Record) if record.row["event"] == event]

    def warnings(self) -> list[str]:
        return [say.text for say in self.only(Say) if say.kind == "warning"]

    def items(self) -> list[Item]:
        """All items that stage 0 was sent."""
        return [item for message in self.sent(Work) for item in message.items]

    def items_of(self, kind: type[ItemType]) -> list[ItemType]:
        return [item for item in self.items() if isinstance(item, kind)]

    @property
    def next_item(self) -> Item | None:
        """What the first worker of stage 0 has to do next."""
        return next(iter(self.items()[self._finished[0, 0] :]), None)

    @property
    def outcome(self) -> Outcome | None:
        found = self.only(Finish)
        assert len(found) <= 1
        return found[0].outcome if found else None

    @property
    def end(self) -> Outcome:
        """The outcome of a run that is over."""
        assert self.outcome is not None
        return self.outcome

    @property
    def failure(self) -> Failure:
        """Of a run that failed."""
        assert self.end.failure is not None
        return self.end.failure

    @property
    def result(self) -> dict[str, Any]:
        """Of a run that is done."""
        assert self.end.result is not None, self.end
        return self.end.result


def peer_of(stage: int, replica: int = 0) -> bytes:
    return b"peer%d.%d" % (stage, replica) if replica else b"peer%d" % stage


def pid_of(rank: int) -> int:
    return 100 + rank


def at_step(step: int) -> Callable[[Item], bool]:
    """For `Run.play`."""
    return lambda item: isinstance(item, Train) and item.step == step


def without_sequence(items: Iterable[Item]) -> list[Item]:
    """Without what differs between generations."""
    found = [replace(item, sequence=0) for item in items]
    return [replace(item, unique="") if isinstance(item, Checkpoint) else item for item in found]


def kinds(items: Iterable[Item]) -> str:
    """t: train, e: epoch, v: validation, x: test, c: checkpoint, s: stop."""
    letters = {"train": "t", "epoch": "e", "checkpoint": "c", "stop": "s"}
    return "".join(
        {"validation": "v", "test": "x"}[item.split] if isinstance(item, Evaluate) else letters[item.kind]
        for item in items
    )
