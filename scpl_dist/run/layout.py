"""Which worker holds which stage, and which part of a micro-batch: ranks, stages and replicas.

    pipeline.stages = 3, pipeline.replicas = 2         pipeline.replicas = [1, 3, 1]
    rank     0 1 2 3 4 5                               rank     0 1 2 3 4
    stage    0 1 2 0 1 2                               stage    0 1 2 1 1
    replica  0 0 0 1 1 1                               replica  0 0 0 1 2

Rank r below the number of stages is the first worker of stage r. The replicas of a stage hold the same weights and
share each micro-batch: its samples are cut into as many consecutive parts as there are replicas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


def share(size: int, replicas: int, replica: int) -> tuple[int, int]:
    """First sample, and the one after the last, of a replica's part of ``size`` samples; parts differ by at most 1."""
    return size * replica // replicas, size * (replica + 1) // replicas


@dataclass(frozen=True, slots=True)
class WorkerId:
    """The place of one worker in its stage of `replicas` workers."""

    rank: int
    stage: int
    replica: int
    replicas: int

    @property
    def label(self) -> str:
        """Such as "1", or "1.0" where the stage has several workers."""
        return f"{self.stage}.{self.replica}" if self.replicas > 1 else str(self.stage)

    @property
    def first(self) -> bool:
        """Whether it speaks for its stage: writes the checkpoints, and its losses are recorded."""
        return self.replica == 0

    @property
    def file(self) -> str:
        return f"stage{self.label}"


@dataclass(frozen=True, slots=True)
class Route:
    """Samples of a micro-batch that go from a rank to one of a neighbouring stage; ``begin == end`` is none."""

    sender: int
    receiver: int
    begin: int
    end: int


class Layout:
    """The workers of a run by rank, from the number of workers of each stage."""

    def __init__(self, replicas: Sequence[int]) -> None:
        self.replicas = tuple(replicas)
        self.stages = len(self.replicas)
        self.world = sum(self.replicas)
        order = itertools.product(range(max(self.replicas)), range(self.stages))
        places = [(stage, replica) for replica, stage in order if replica < self.replicas[stage]]
        self.workers = [WorkerId(rank, *place, self.replicas[place[0]]) for rank, place in enumerate(places)]
        self._ranks = {place: rank for rank, place in enumerate(places)}

    def rank(self, stage: int, replica: int) -> int:
        """Rank of a worker; -1 if the run has no such one."""
        return self._ranks.get((stage, replica), -1)

    def ranks(self, stage: int) -> list[int]:
        return [self._ranks[stage, replica] for replica in range(self.replicas[stage])]

    def lead(self, stage: int, receiver: WorkerId) -> int:
        """Rank of the worker of the stage before that sends `receiver` the markers, and some message of every item."""
        return self._ranks[stage, receiver.replica * self.replicas[stage] // receiver.replicas]

    def routes(self, source: int, target: int, size: int) -> list[Route]:
        """What travels when a micro-batch of `size` samples passes from one stage to the next or back.

        There is a route wherever the parts of a sender and a receiver overlap; downstream also from every receiver's
        `lead`, perhaps without samples. Neither stage may have more workers than there are samples.
        """
        found = []
        for sender, receiver in itertools.product(self.ranks(source), self.ranks(target)):
            theirs, mine = self.workers[sender], self.workers[receiver]
            has, wants = (share(size, worker.replicas, worker.replica) for worker in (theirs, mine))
            begin, end = max(has[0], wants[0]), min(has[1], wants[1])
            if begin < end:
                found.append(Route(sender, receiver, begin, end))
            elif target > source and self.lead(source, mine) == sender:
                found.append(Route(sender, receiver, has[0], has[0]))
        return found

    def links(self) -> list[tuple[int, int]]:
        """Ranks of all workers that may send each other something, those of the earlier stage first."""
        neighbours = itertools.pairwise(map(self.ranks, range(self.stages)))
        return [pair for before, after in neighbours for pair in itertools.product(before, after)]
