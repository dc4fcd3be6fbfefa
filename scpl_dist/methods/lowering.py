"""Adds to a method's program what a stage has to wait for: room at its neighbours, its replicas, all other stages.

A method says what a stage computes and passes on, as if every neighbour had room and every stage one worker. Small pure
passes over that program make the rest of it, as torch's pipelining lowers its schedules:

    of the method    LOAD F0      LOSS0 B0 STEP0        F1 SEND_F       LOSS1 B1 STEP1
    room             LOAD F0      LOSS0 B0 STEP0 ROOM_F F1 SEND_F       LOSS1 B1 STEP1
    gathers, sums    LOAD F0 GATHER0 LOSS0 B0 SUM0 ROOM_F F1 SEND_F GATHER1 LOSS1 B1 SUM1 STEP0 STEP1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from scpl_dist.methods.schedule import Action, Kind, StageSpec


def lower(program: Iterable[Action], spec: StageSpec, clip: bool = False) -> tuple[Action, ...]:
    """The whole program of a stage; `clip`: its updates need the length of the gradient of the whole model."""
    program = room(measured(program, spec) if clip else program, spec)
    if spec.replicas > 1:
        program = sums(gathers(program))
    return tuple(program)


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
    """Show every objective the samples of all replicas."""
    for action in program:
        if action.kind is Kind.LOSS:
            yield Action(Kind.GATHER, action.block, action.micro_batch)
        yield action


def sums(program: Iterable[Action]) -> Iterator[Action]:
    """Add up gradients over the replicas before each update; the sums travel while the stage computes.

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
            begun.append(action)
        else:
            yield action
    yield from due + begun
