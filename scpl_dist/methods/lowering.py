"""Makes of a method's program that of a stage: without what is frozen, and with all that has to be waited for.

A method says what a stage computes and passes on, as if every block learned, every neighbour had room and every stage
one worker. Small pure passes over that program make the rest of it, as torch's pipelining lowers its schedules:

    of the method    LOAD F0      LOSS0 B0 STEP0        F1 SEND_F       LOSS1 B1 STEP1
    room             LOAD F0      LOSS0 B0 STEP0 ROOM_F F1 SEND_F       LOSS1 B1 STEP1
    gathers, sums    LOAD F0 GATHER0 LOSS0 B0 SUM0 ROOM_F F1 SEND_F GATHER1 LOSS1 B1 SUM1 STEP0 STEP1
    offloaded        LOAD HAVE0 FETCH1 F0 LOSS0 B0 STEP0 PUT0 ROOM_F HAVE1 FETCH0 F1 SEND_F LOSS1 B1 STEP1 PUT1
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Set

from scpl_dist.methods.schedule import Action, Kind, StageSpec

NONE: frozenset[int] = frozenset()


def lower(
    program: Iterable[Action],
    spec: StageSpec,
    clip: bool = False,
    frozen: Set[int] = NONE,
    local: bool = True,
    offload: bool = False,
) -> tuple[Action, ...]:
    """The whole program of a stage.

    `clip`: its updates need the length of the gradient of the whole model. `frozen` blocks do not learn, and `local`
    is that of the method. `offload`: one block after the other is on the device.
    """
    if frozen:
        program = without(frozen, program, spec, local)
    program = room(measured(program, spec) if clip else program, spec)
    if spec.replicas > 1:
        program = sums(gathers(program), early=not offload)
    return tuple(offloaded(program, spec) if offload else program)


def without(frozen: Set[int], program: Iterable[Action], spec: StageSpec, local: bool) -> Iterator[Action]:
    """Leave out what only learning needs.

    Where blocks learn alone, a forward pass is left of a frozen one. Where gradients are handed on, they end at the
    first block that learns; a frozen one behind it hands them on, and has no update.

        of the method, local   LOAD F0 LOSS0 B0 STEP0 F1 SEND_F LOSS1 B1 STEP1
        block 0 frozen         LOAD F0                F1 SEND_F LOSS1 B1 STEP1
    """
    first = first_learning(frozen)
    for action in program:
        passed = action.block in frozen if local else 0 <= action.block < first
        match action.kind:
            case Kind.STEP if action.block in frozen:
                continue
            case Kind.EMBED | Kind.LOSS | Kind.BACKWARD | Kind.RECOMPUTE if passed:
                continue
            case Kind.SEND_B if not local and spec.blocks[0] <= first:
                continue
            case Kind.RECV_B if not local and spec.blocks[-1] < first:
                continue
        yield action


def first_learning(frozen: Set[int]) -> int:
    """The first block that is not frozen."""
    return next(block for block in itertools.count() if block not in frozen)


def room(program: Iterable[Action], spec: StageSpec) -> Iterator[Action]:
    """Wait for room before whatever makes a message: a slow neighbour never holds this stage back after a forward."""
    for action in program:
        if action.kind is Kind.FORWARD and action.block == spec.blocks[-1] and not spec.last:
            yield Action(Kind.ROOM_F, micro_batch=action.micro_batch)
        elif action.kind in (Kind.SEND_B, Kind.SEND_N):
            yield Action(Kind.ROOM_B, micro_batch=action.micro_batch)
        elif action.kind is Kind.SEND_T:
            yield Action(Kind.ROOM_F, micro_batch=action.micro_batch)
        yield action


def measured(program: Iterable[Action], spec: StageSpec) -> Iterator[Action]:
    """Measure the gradient of the whole model before the first update.

    The squares of all blocks come together in the first stage, which adds them up in the order of the blocks: the
    length, which goes back to all, does not depend on the number of stages.

        stage 0  B0 B1               RECV_N NORM1 NORM0 TOTAL SEND_T STEP0 STEP1
        stage 1  B2 B3 NORM3 NORM2 SEND_N                            RECV_T STEP2 STEP3
    """
    updates = []
    for action in program:
        if action.kind is Kind.STEP:
            updates.append(action)
        else:
            yield action
    if not spec.last:
        yield Action(Kind.RECV_N)
    for block in reversed(spec.blocks):
        yield Action(Kind.NORM, block)
    yield Action(Kind.TOTAL) if spec.first else Action(Kind.SEND_N)
    if not spec.first:
        yield Action(Kind.RECV_T)
    if not spec.last:
        yield Action(Kind.SEND_T)
    yield from updates


def gathers(program: Iterable[Action]) -> Iterator[Action]:
    """Show every objective the samples of all replicas; what is embedded first is gathered there."""
    for action in program:
        if action.kind is Kind.LOSS and action.micro_batch >= 0:
            yield Action(Kind.GATHER, action.block, action.micro_batch)
        yield action


def sums(program: Iterable[Action], early: bool) -> Iterator[Action]:
    """Add up gradients over the replicas before each update; `early` sums travel while the stage computes.

    So an update follows the first sum that begins after a further backward pass, or the end of the program.
    """
    begun: list[Action] = []
    due: list[Action] = []
    for action in program:
        if action.kind is Kind.BACKWARD:
            due += begun
            begun = []
        if action.kind is Kind.STEP:
            yield Action(Kind.SUM, action.block)
            yield from due
            due = []
            if early:
                begun.append(action)
            else:
                yield action
        else:
            yield action
    yield from due + begun


def offloaded(program: Iterable[Action], spec: StageSpec) -> Iterator[Action]:
    """Have each block while something is done with it, and the next one on its way.

    The next item begins with the first block again, which is fetched at the end. A block that is the next one, too,
    stays.
    """
    # Of each turn: the block, what is done with it, and what is done without any after it.
    turns: list[tuple[int, list[Action], list[Action]]] = [(-1, [], [])]
    for action in program:
        block, own, after = turns[-1]
        if action.block < 0:
            after.append(action)
        elif action.block == block:
            own += [*after, action]
            after.clear()
        else:
            turns.append((action.block, [action], []))
    yield from turns[0][2]
    following = [*(block for block, _, _ in turns[2:]), spec.blocks[0]]
    for (block, own, after), upcoming in zip(turns[1:], following, strict=True):
        yield Action(Kind.HAVE, block)
        if upcoming != block:
            yield Action(Kind.FETCH, upcoming)
        yield from own
        if upcoming != block:
            yield Action(Kind.PUT, block)
        yield from after
