"""The workers as the coordinator knows them, and who may become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from scpl_dist.control.items import Computed, Item, Train
from scpl_dist.control.messages import PROTOCOL, VERSION, Done, Failed, Heartbeat, Hello, Stats
from scpl_dist.run.failures import MEANING, Cause, Failure
from scpl_dist.run.layout import WorkerId
from scpl_dist.run.phases import Phase


@dataclass(slots=True)
class Member:
    """One worker of the run. Times are monotonic seconds."""

    peer: bytes
    hello: Hello
    heard: float  # when a message came last
    changed: float  # when it last did something else than before
    worker: WorkerId | None = None  # its place in the present group, or in the last one
    endpoint: dict[str, Any] = field(default_factory=dict)  # where the others meet it
    free: bool = True  # to be part of the next group
    leaving: bool = False  # it shall not be part of it
    awaited: bool = True  # when it is gone, another one in its place
    built: bool = False
    blocks: list[int] = field(default_factory=list)  # that it holds
    block_seconds: dict[str, float] = field(
        default_factory=dict
    )  # of training, when it finished its last item
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
    def placed(self) -> WorkerId:
        assert self.worker is not None, "it has no place yet"
        return self.worker

    @property
    def stage(self) -> int:
        return self.placed.stage

    @property
    def rank(self) -> int:
        return self.placed.rank

    @property
    def first(self) -> bool:
        return self.placed.first

    @property
    def place(self) -> tuple[int, int]:
        return self.placed.stage, self.placed.replica

    @property
    def name(self) -> str:
        """As the worker calls itself: "stage 1", or "stage 1.0" where the stage has several."""
        return (
            f"stage {self.worker.label}"
            if self.worker
            else f"a worker without a stage (pid {self.hello.pid})"
        )

    def join(self, worker: WorkerId, now: float) -> None:
        """Be part of a new group, in this place."""
        self.worker = worker
        self.free = self.built = self.ready = self.left = False
        self.awaited = True
        self.changed = now
        self.phase = Phase.STARTING
        self.done = -1
        self.kinds = set()
        self.stats = replace(self.stats, begun=-1)
        self.losses = {}
        self.slow_in_a_row = 0

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


def objection(candidate: Hello, others: Collection[Hello], digest: str) -> str | None:
    """Why this worker cannot take part in a run, with both values; None if it can."""
    first = next(iter(others), candidate)
    pairs = [
        ("protocol", candidate.protocol, PROTOCOL),
        ("scpl_dist version", candidate.version, VERSION),
        ("torch version", candidate.torch, first.torch),
        ("configuration digest", candidate.config, digest),
        ("digest of the user's files", candidate.code, first.code),
    ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            return f"{name} of this worker is {theirs}, the run has {ours}"
    return None


def blame(member: Member, cause: Cause, text: str, advice: str = "", report: Failed | None = None) -> Failure:
    """A failure at the place where the worker was seen last, or where its own report says it was."""
    hello, worker = member.hello, member.worker
    seen = report or member
    return Failure(
        cause=cause,
        message=text,
        advice=advice or MEANING[cause].advice,
        stage=worker.stage if worker else None,
        replica=worker.replica if worker else None,
        host=hello.host,
        rank=worker.rank if worker else hello.rank,
        pid=hello.pid,
        phase=seen.phase,
        step=seen.step,
        micro_batch=seen.micro_batch,
        traceback=report.traceback or None if report else None,
        log=hello.log or None,
    )
