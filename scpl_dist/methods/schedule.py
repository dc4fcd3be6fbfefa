"""Schedules as data: what one stage does for one item, as a list of small frozen actions.

A method is a generator of what a stage computes and passes on; what it has to wait for is added to that
(`scpl_dist.methods.lowering`), and one executor (`scpl_dist.worker.executor`) carries it out. As data, schedules can be
printed, compared with golden pictures, and checked for missing messages and deadlocks without a process.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What an action does; the value is its text form. Those marked * are added by lowering."""

    LOAD = "LOAD"  # stage 0 takes the samples of a micro-batch
    RECV_F = "RECV_F"  # take its activations and labels from the stage before
    FORWARD = "F"  # of a block
    ROOM_F = "ROOM_F"  # * wait until the stage behind has room for the output
    SEND_F = "SEND_F"  # pass the newest output to the stage behind
    EMBED = "E"  # what the objective of a block sees of a micro-batch, without what made it
    RECOMPUTE = "R"  # forward of a block again, because its activations were not kept
    GATHER = "GATHER"  # * let the objective of a block see the samples of all replicas of the stage
    LOSS = "LOSS"  # local objective of a block, of a micro-batch or of all that were embedded
    BACKWARD = "B"  # from the loss of a block, or from the gradient of its output
    ROOM_B = "ROOM_B"  # * wait until the stage before has room for what goes back to it
    SEND_B = "SEND_B"  # pass back what it waits for: the gradient of the stage's input, or an answer
    RECV_B = "RECV_B"  # take the same from the stage behind
    SUM = "SUM"  # * begin to add up the gradients of a block over the replicas; its STEP waits for the sum
    NORM = "NORM"  # * square of the length of a block's gradient
    SEND_N = "SEND_N"  # * pass those of this stage, and of all behind, to the stage before
    RECV_N = "RECV_N"  # * take them from the stage behind
    TOTAL = "TOTAL"  # * length of the gradient of all blocks
    SEND_T = "SEND_T"  # * pass it to the stage behind
    RECV_T = "RECV_T"  # * take it from the stage before
    STEP = "STEP"  # update a block and its heads
    PREDICT = "PRED"  # answer of a block: class scores, or a code of them
    DECODE = "DEC"  # carry an answer back over a block
    COUNT = "COUNT"  # compare the answer with the labels
    FETCH = "FETCH"  # * begin to bring a block to the device
    HAVE = "HAVE"  # * wait until it is there
    PUT = "PUT"  # * begin to put it away


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a stage does, such as ``F2.0``: the forward of block 2 for micro-batch 0 of the item."""

    kind: Kind
    block: int = -1  # -1: it is of no block; likewise for micro-batches
    micro_batch: int = -1

    def __str__(self) -> str:
        block = "" if self.block < 0 else str(self.block)
        return f"{self.kind}{block}" + ("" if self.micro_batch < 0 else f".{self.micro_batch}")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Where a stage stands: its number, the number of stages, its consecutive blocks, and its workers."""

    stage: int
    stages: int
    blocks: range
    replicas: int = 1

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1


class ScheduleError(AssertionError):
    """A schedule that cannot run: a message without its partner, or stages that wait for each other."""


# Time units of an action in a simulation. A backward pass costs about two forward passes.
COST = {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: 2}
_ROOM = {Kind.ROOM_F: 1, Kind.ROOM_B: -1}
_SENDS = {Kind.SEND_F: 1, Kind.SEND_B: -1, Kind.SEND_N: -1, Kind.SEND_T: 1}
_RECEIVES = {Kind.RECV_F: -1, Kind.RECV_B: 1, Kind.RECV_N: 1, Kind.RECV_T: -1}


@dataclass(slots=True)
class _Channel:
    """What passes from one stage to another in a simulation."""

    sent: list[tuple[int, Action]] = field(default_factory=list)  # when, and what
    taken: list[int] = field(default_factory=list)  # when each of them was received
    granted: bool = False  # its room was waited for and is not used yet


def simulate(programs: Sequence[Iterable[Action]], capacity: int) -> list[list[tuple[int, int, Action]]]:
    """Run the lowered programs of all stages, stage 0 first, against each other with bounded channels.

    A stage waits in ROOM while ``capacity`` (``pipeline.max_in_flight``) messages are not yet received, and in RECV for
    its message. Nothing else takes time but what has a `COST`: messages arrive at once, and a stage is one worker, so
    waits for the data (LOAD) and for other replicas (GATHER, and the STEP after a SUM) are not seen. Those of replicas
    cannot lock a run up: the workers of a stage have one program, and so meet in the same order.

    Returns for every stage its actions as (start, end, action) in units of `COST`.
    """
    queues = [deque(program) for program in programs]
    clock = [0] * len(queues)
    channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)
    timeline: list[list[tuple[int, int, Action]]] = [[] for _ in queues]
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                action = queue[0]
                start = clock[stage]
                if action.kind in _ROOM:
                    channel = channels[stage, stage + _ROOM[action.kind]]
                    over = len(channel.sent) - capacity
                    if over >= len(channel.taken):
                        break
                    if over >= 0:
                        start = max(start, channel.taken[over])
                    channel.granted = True
                elif action.kind in _SENDS:
                    target = stage + _SENDS[action.kind]
                    if not 0 <= target < len(queues):
                        raise ScheduleError(f"stage {stage}: {action} has no receiver")
                    channel = channels[stage, target]
                    if not channel.granted:
                        raise ScheduleError(f"stage {stage}: nothing waits for room before {action}")
                    channel.granted = False
                    channel.sent.append((start, action))
                elif action.kind in _RECEIVES:
                    source = stage + _RECEIVES[action.kind]
                    channel = channels[source, stage]
                    if len(channel.taken) == len(channel.sent):
                        break
                    ready, message = channel.sent[len(channel.taken)]
                    if message.micro_batch != action.micro_batch:
                        raise ScheduleError(f"stage {stage}: {action} meets {message} of stage {source}")
                    start = max(start, ready)
                    channel.taken.append(start)
                queue.popleft()
                clock[stage] = start + COST.get(action.kind, 0)
                timeline[stage].append((start, clock[stage], action))
                moved = True
        if not moved:
            stuck = ", ".join(f"stage {k} at {queue[0]}" for k, queue in enumerate(queues) if queue)
            raise ScheduleError(f"deadlock: {stuck}")
    for (source, target), channel in channels.items():
        for _, message in channel.sent[len(channel.taken) :]:
            raise ScheduleError(f"stage {target} never takes {message} of stage {source}")
    return timeline
