"""The workers as the coordinator knows them, and who may become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from scpl_dist.control.items import Computed, Item, Train
from scpl_dist.control.messages import PROTOCOL, VERSION, Done, Failed, Heartbeat, Hello, Stats
from scpl_dist.run.config import Config
from scpl_dist.run.failures import MEANING, Cause, Failure
from scpl_dist.run.phases import Phase


@dataclass(slots=True)
class Member:
    """One worker of the run. Times are monotonic seconds."""

    peer: bytes
    hello: Hello
    heard: float
    """When a message came last."""
    changed: float
    """When the stage last did something else than before."""
    phase: Phase = Phase.STARTING
    step: int = 0
    epoch: int = 0
    micro_batch: int | None = None
    ready: bool = False
    left: bool = False
    done: int = -1
    """Sequence number of the last item that the stage finished."""
    kinds: set[str] = field(default_factory=set)
    """Kinds of items that the stage has finished at least once."""
    stats: Stats = field(default_factory=Stats)
    busy_before: float = 0.0
    """Busy seconds of the stage when it finished its last item."""
    losses: dict[str, float] = field(default_factory=dict)
    """Latest loss of each of the stage's blocks."""
    micro_batches: Counter[str] = field(default_factory=Counter)
    stragglings: int = 0
    slow_in_a_row: int = 0

    @property
    def stage(self) -> int:
        return self.hello.stage

    @property
    def first(self) -> bool:
        """Whether it speaks for its stage."""
        return self.hello.replica == 0

    @property
    def place(self) -> tuple[int, int]:
        """Stage and replica, which order the workers where they are shown."""
        return self.hello.stage, self.hello.replica

    @property
    def name(self) -> str:
        """For messages, such as "stage 1" or "stage 1 replica 2"."""
        return _name(self.hello)

    def forgive(self, pause: float) -> None:
        """Do not count a time in which nobody listened."""
        self.heard += pause
        self.changed += pause

    def beat(self, message: Heartbeat, now: float) -> None:
        """Take over what a heartbeat says."""
        before = (self.phase, self.step, self.micro_batch, self.stats.begun)
        if before != (message.phase, message.step, message.micro_batch, message.stats.begun):
            self.changed = now
        self.phase = message.phase
        self.step = message.step
        self.epoch = message.epoch
        self.micro_batch = message.micro_batch
        self.stats = message.stats

    def finish(self, message: Done, item: Item, now: float) -> None:
        """Take over what a finished item says."""
        self.done = message.sequence
        self.changed = now
        self.kinds.add(item.kind)
        self.stats = message.stats
        self.busy_before = message.stats.busy
        if isinstance(item, Train):
            self.step = item.step
            self.epoch = item.epoch
        if isinstance(item, Computed):
            self.micro_batches[item.kind] += len(item.micro_batches)


def objection(peer: bytes, hello: Hello, members: Mapping[int, Member], config: Config) -> str | None:
    """Why this worker cannot take part, with both values; None if it can."""
    first = next(iter(members.values()), None)
    pairs = [
        ("protocol", hello.protocol, PROTOCOL),
        ("scpl_dist version", hello.version, VERSION),
        ("torch version", hello.torch, first.hello.torch if first else hello.torch),
        ("pipeline.stages", hello.stages, config.pipeline.stages),
        ("configuration digest", hello.config, config.digest()),
    ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            return f"{name} of this worker is {theirs}, the run has {ours}"
    rank = config.layout.rank(hello.stage, hello.replica)
    if rank < 0:
        return f"{_name(hello)} does not exist, the run has {config.pipeline.stages} stages"
    for member in members.values():
        if member.peer == peer or member.place == (hello.stage, hello.replica):
            there = member.hello
            return f"{member.name} is taken by rank {there.rank} (pid {there.pid} on {there.host})"
    return None


def _name(hello: Hello) -> str:
    return f"stage {hello.stage}" + (f" replica {hello.replica}" if hello.replica else "")


def blame(
    member: Member, cause: Cause, message: str, advice: str | None = None, report: Failed | None = None
) -> Failure:
    """A failure at the place where the worker was seen last, or where its own report says it was."""
    seen = report or member
    return Failure(
        cause=cause,
        message=message,
        advice=MEANING[cause].advice if advice is None else advice,
        stage=member.stage,
        replica=member.hello.replica,
        host=member.hello.host,
        rank=member.hello.rank,
        pid=member.hello.pid,
        phase=seen.phase,
        step=seen.step,
        micro_batch=seen.micro_batch,
        traceback=report.traceback or None if report else None,
    )
