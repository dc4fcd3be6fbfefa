"""Which consecutive blocks a stage holds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence


def split(counts: Sequence[int]) -> list[range]:
    """Ranges of blocks from the number of blocks of each stage: ``[1, 3]`` gives ``[range(0, 1), range(1, 4)]``."""
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def balanced(costs: Sequence[float], stages: int, workers: Sequence[float] | None = None) -> list[int]:
    """Block counts that make the slowest stage as fast as possible; ties favour even counts.

    Exact: dynamic programming over all cuts. Every stage has at least one block; the `workers` of a stage, one each
    without numbers, share its cost, and one that is slow counts as less than one.
    """
    workers = workers or [1] * stages
    total = list(itertools.accumulate(costs, initial=0.0))

    @functools.cache
    def best(stages: int, end: int) -> tuple[float, int, int, list[int]]:
        """The first `end` blocks: cost of the slowest stage, sum of squared counts, last cut, and the counts."""
        if stages == 0:
            return (0.0 if end == 0 else math.inf), 0, 0, []
        found = []
        for cut in range(stages - 1, end):
            slowest, squares, _, counts = best(stages - 1, cut)
            own = (total[end] - total[cut]) / workers[stages - 1]
            found.append((max(slowest, own), squares + (end - cut) ** 2, cut, [*counts, end - cut]))
        return min(found)

    return best(stages, len(costs))[3]
