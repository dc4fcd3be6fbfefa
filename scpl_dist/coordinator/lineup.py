"""Who holds which stage of the next group: as many stages and replicas as there are workers for, and who stays where.

present           elastic    stages            who
0 . 2 3  new      -          4                 0 new 2 3      the lost one is replaced, the others stay
0 . 2 3           [1, 4]     3                 0 2 3          in their order, so that most blocks stay where they are
0 1 new           [1, 3]     3                 0 1 new
0.0 . 1.0         [2, 2]     2 (replicas 1 1)  0.0 1.0        a lost replica only shrinks its stage
"""

from __future__ import annotations

from collections.abc import Sequence

from scpl_dist.coordinator.members import Member
from scpl_dist.run.config import Config
from scpl_dist.run.layout import Layout


def shape(config: Config, present: Sequence[Member]) -> list[int] | None:
    """Workers of each stage of the next group; None if there are too few. `config` is as the user wrote it."""
    wanted, elastic = list(config.layout.replicas), config.pipeline.elastic
    if max(wanted) == 1 and elastic:
        fewest, most = elastic
        stages = min(most, len(present))
        return [1] * stages if stages >= fewest else None
    if len(present) >= sum(wanted):
        return wanted
    if not elastic or len(present) < len(wanted):
        return None
    return _shrunk(wanted, present)


def _shrunk(wanted: list[int], present: Sequence[Member]) -> list[int]:
    """Fewer replicas: of the stages that lost some, or else of the largest."""
    held = [0] * len(wanted)
    for member in present:
        if member.worker is not None and member.stage < len(wanted):
            held[member.stage] += 1
    held = [min(has, most) for has, most in zip(held, wanted, strict=True)]
    while sum(held) < len(present):
        neediest = min(range(len(held)), key=lambda stage: held[stage] / wanted[stage])
        held[neediest] += 1
    while 0 in held:
        held[held.index(max(held))] -= 1
        held[held.index(0)] += 1
    return held


def assigned(present: Sequence[Member], layout: Layout, same: bool) -> dict[int, Member]:
    """The members of the next group by rank; `same` says whether the stages are those of the last one.

    A worker stays where it was if it can, or where it was started for; beyond that, those that had a stage keep their
    order. Whoever is not needed has no rank.
    """
    found: dict[int, Member] = {}
    left = sorted(present, key=lambda member: member.place if member.worker else (layout.stages, 0))
    if same:
        ranks = {member.peer: layout.rank(*member.place) for member in left if member.worker}
        ranks |= {
            member.peer: member.hello.rank
            for member in left
            if member.worker is None and member.hello.rank is not None and member.hello.rank < layout.world
        }
        for member in left:
            rank = ranks.get(member.peer, -1)
            if rank >= 0 and rank not in found:
                found[rank] = member
    taken = {member.peer for member in found.values()}
    others = [member for member in left if member.peer not in taken]
    by_place = sorted(layout.workers, key=lambda worker: (worker.replica, worker.stage))
    open_ranks = [worker.rank for worker in by_place if worker.rank not in found]
    return found | dict(zip(open_ranks, others, strict=False))
