"""Schedules as data: what one stage does for one item, as a list of small frozen actions.

A method is a generator of what a stage computes and passes on; what it has to wait for is added to that
(`scpl_dist.methods.lowering`, marked * below), and one executor (`scpl_dist.worker.executor`) carries it out. As data,
schedules can be printed, compared with golden pictures, and checked for missing messages and deadlocks without a
process.

    text        meaning (b: block, m: micro-batch of the item)
    LOAD.m      stage 0 takes the samples of m
    RECV_F.m    take activations and labels of m from the stage before
    Fb.m        forward of block b
    ROOM_F.m  * wait until the stage behind has room for the output of m
    SEND_F.m    pass the newest output of m to the stage behind
    Rb.m        forward of block b again, because its activations were not kept (recomputation)
    GATHERb.m * let the objective of block b see the samples of all replicas of the stage
    LOSSb.m     local objective of block b
    Bb.m        backward: from the loss of block b, or from the gradient of its output
    ROOM_B.m  * wait until the stage before has room for what goes back to it
    SEND_B.m    pass back what the stage before waits for: the gradient of the stage's input, or an answer
    RECV_B.m    take the same from the stage behind
    SUMb      * begin to add up the gradients of block b over the stage's replicas; STEPb waits for the sum
    STEPb       update block b and its heads
    PREDb.m     answer of block b: class scores, or a code of them
    DECb.m      carry an answer back over block b
    COUNT.m     compare the answer with the labels
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does; the value is its text form."""

    LOAD = "LOAD"
    RECV_F = "RECV_F"
    FORWARD = "F"
    ROOM_F = "ROOM_F"
    SEND_F = "SEND_F"
    RECOMPUTE = "R"
    GATHER = "GATHER"
    LOSS = "LOSS"
    BACKWARD = "B"
    ROOM_B = "ROOM_B"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    SUM = "SUM"
    STEP = "STEP"
    PREDICT = "PRED"
    DECODE = "DEC"
    COUNT = "COUNT"


_TEXT = re.compile(
    rf"(?P<kind>{'|'.join(sorted(Kind, key=len, reverse=True))})(?P<block>\d*)(?:\.(?P<micro_batch>\d+))?"
)


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a stage does; ``str`` and `from_text` are inverse to each other."""

    kind: Kind
    block: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        block = "" if self.block is None else str(self.block)
        return f"{self.kind}{block}" + ("" if self.micro_batch is None else f".{self.micro_batch}")

    @classmethod
    def from_text(cls, text: str) -> Action:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no action: write KIND, block, dot, micro-batch, for example F2.0")
        numbers = {name: int(match[name]) if match[name] else None for name in ("block", "micro_batch")}
        return cls(Kind(match["kind"]), **numbers)


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
_SENDS = {Kind.SEND_F: 1, Kind.SEND_B: -1}
_RECEIVES = {Kind.RECV_F: -1, Kind.RECV_B: 1}


def simulate(programs: Sequence[Iterable[Action]], capacity: int) -> list[list[tuple[int, int, Action]]]:
    """Run the lowered programs of all stages against each other with bounded channels.

    A stage waits in ROOM while ``capacity`` messages are not yet received, and in RECV for its message: nowhere else.
    The replicas of a stage have one program, so those that add up or gather meet in the same order.

    Args:
        programs: the actions of every stage, stage 0 first.
        capacity: messages that a channel holds, ``pipeline.max_in_flight``.

    Returns:
        For every stage its actions as (start, end, action) in units of `COST`.

    Raises:
        ScheduleError: the stages wait for each other, or a message is sent without room, never received, or received
            in another order.
    """
    queues = [deque(program) for program in programs]
    clock = [0] * len(queues)
    channels: dict[tuple[int, int], deque[tuple[int, Action]]] = {}
    freed: dict[tuple[int, int], list[int]] = {}  # times at which receives made room, per channel
    sent: dict[tuple[int, int], int] = {}
    granted: set[tuple[int, int]] = set()  # channels whose room was waited for and is not used yet
    timeline: list[list[tuple[int, int, Action]]] = [[] for _ in queues]
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                action = queue[0]
                start = clock[stage]
                if action.kind in _ROOM:
                    channel = (stage, stage + _ROOM[action.kind])
                    room = freed.get(channel, [])
                    over = sent.get(channel, 0) - capacity
                    if over >= len(room):
                        break
                    start = max(start, room[over]) if over >= 0 else start
                    granted.add(channel)
                elif action.kind in _SENDS:
                    channel = (stage, stage + _SENDS[action.kind])
                    if not 0 <= channel[1] < len(queues):
                        raise ScheduleError(f"stage {stage}: {action} has no receiver")
                    if channel not in granted:
                        raise ScheduleError(f"stage {stage}: nothing waits for room before {action}")
                    granted.remove(channel)
                    channels.setdefault(channel, deque()).append((start, action))
                    sent[channel] = sent.get(channel, 0) + 1
                elif action.kind in _RECEIVES:
                    channel = (stage + _RECEIVES[action.kind], stage)
                    if not channels.get(channel):
                        break
                    ready, message = channels[channel].popleft()
                    if message.micro_batch != action.micro_batch:
                        raise ScheduleError(f"stage {stage}: {action} meets {message} of stage {channel[0]}")
                    start = max(start, ready)
                    freed.setdefault(channel, []).append(start)
                queue.popleft()
                clock[stage] = start + COST.get(action.kind, 0)
                timeline[stage].append((start, clock[stage], action))
                moved = True
        if not moved:
            stuck = ", ".join(f"stage {k} at {queue[0]}" for k, queue in enumerate(queues) if queue)
            raise ScheduleError(f"deadlock: {stuck}")
    for (source, target), left in channels.items():
        if left:
            raise ScheduleError(f"stage {target} never takes {left[0][1]} of stage {source}")
    return timeline


def picture(programs: Sequence[Iterable[Action]], capacity: int) -> str:
    """Forward and backward passes of all stages over time, a row a stage, a column a time unit.

    ``F2`` is the forward of micro-batch 2 (a running number over all items), ``R2`` its recomputation, ``B2`` its
    backward; dots are idle.
    """
    rows = []
    timeline = simulate(programs, capacity)
    length = max(end for row in timeline for _, end, _ in row)
    width = 0
    for row in timeline:
        cells = [""] * length
        seen: dict[tuple[Kind, int | None, int | None], int] = {}
        for start, end, action in row:
            if action.kind in COST:
                key = (action.kind, action.block, action.micro_batch)
                run = seen[key] = seen.get(key, -1) + 1
                # An item that repeats the same program continues the count of micro-batches.
                number = run * (1 + max((a.micro_batch or 0) for *_, a in row)) + (action.micro_batch or 0)
                for slot in range(start, end):
                    cells[slot] = f"{action.kind}{number}"
        rows.append(cells)
        width = max(width, *map(len, cells))
    lines = [
        f"stage {k} " + " ".join((cell or ".").ljust(width) for cell in cells).rstrip(" ")
        for k, cells in enumerate(rows)
    ]
    return "\n".join(lines)
