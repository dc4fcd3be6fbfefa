"""The workers as the coordinator knows them, and who may become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
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
    heard: float  # when a message came last
    changed: float  # when it last did something else than before
    several: bool = False  # whether its stage has several workers
    phase: Phase = Phase.STARTING
    step: int = 0
    epoch: int = 0
    micro_batch: int | None = None
    ready: bool = False
    left: bool = False
    done: int = -1  # sequence number of the last item that it finished
    kinds: set[str] = field(default_factory=set)  # of items that it has finished at least once
    stats: Stats = field(default_factory=Stats)
    busy_before: float = 0.0  # its busy seconds when it finished its last item
    losses: dict[str, float] = field(default_factory=dict)  # the latest of each of its blocks
    micro_batches: Counter[str] = field(default_factory=Counter)
    stragglings: int = 0
    slow_in_a_row: int = 0

    @property
    def stage(self) -> int:
        return self.hello.stage

    @property
    def first(self) -> bool:
        return self.hello.replica == 0

    @property
    def place(self) -> tuple[int, int]:
        return self.hello.stage, self.hello.replica

    @property
    def name(self) -> str:
        """As the worker calls itself: "stage 1", or "stage 1.0" where the stage has several."""
        several = self.several or not self.first
        return f"stage {self.stage}.{self.hello.replica}" if several else f"stage {self.stage}"

    def beat(self, message: Heartbeat, now: float) -> None:
        before = (self.phase, self.step, self.micro_batch, self.stats.begun)
        if before != (message.phase, message.step, message.micro_batch, message.stats.begun):
            self.changed = now
        self.phase = message.phase
        self.step = message.step
        self.epoch = message.epoch
        self.micro_batch = message.micro_batch
        self.stats = message.stats

    def finish(self, message: Done, item: Item, now: float) -> None:
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


def objection(candidate: Member, members: Collection[Member], config: Config) -> str | None:
    """Why this worker cannot take part, with both values; None if it can."""
    hello = candidate.hello
    first = next(iter(members), candidate).hello
    pairs = [
        ("protocol", hello.protocol, PROTOCOL),
        ("scpl_dist version", hello.version, VERSION),
        ("torch version", hello.torch, first.torch),
        ("pipeline.stages", hello.stages, config.pipeline.stages),
        ("configuration digest", hello.config, config.digest()),
    ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            return f"{name} of this worker is {theirs}, the run has {ours}"
    if config.layout.rank(*candidate.place) < 0:
        return f"{candidate.name} does not exist, the run has {config.pipeline.stages} stages"
    for member in members:
        if member.peer == candidate.peer or member.place == candidate.place:
            there = member.hello
            return f"{member.name} is taken by rank {there.rank} (pid {there.pid} on {there.host})"
    return None


def blame(member: Member, cause: Cause, text: str, advice: str = "", report: Failed | None = None) -> Failure:
    """A failure at the place where the worker was seen last, or where its own report says it was."""
    hello = member.hello
    seen = report or member
    return Failure(
        cause=cause,
        message=text,
        advice=advice or MEANING[cause].advice,
        stage=hello.stage,
        replica=hello.replica,
        host=hello.host,
        rank=hello.rank,
        pid=hello.pid,
        phase=seen.phase,
        step=seen.step,
        micro_batch=seen.micro_batch,
        traceback=report.traceback or None if report else None,
    )
