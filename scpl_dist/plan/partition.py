"""Which consecutive blocks a stage holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def split(counts: Sequence[int]) -> list[range]:
    """Ranges of blocks from the number of blocks of each stage: ``[1, 3]`` gives ``[range(0, 1), range(1, 4)]``."""
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def balanced(costs: Sequence[float], stages: int, workers: Sequence[int] | None = None) -> list[int]:
    """Block counts that make the slowest stage as fast as possible; ties favour even counts.

    Args:
        costs: cost of each block, any unit, not negative.
        stages: number of stages, at most ``len(costs)``.
        workers: of each stage, which share its cost; None is one each.

    Returns:
        Number of blocks of each stage, each at least 1. Exact: dynamic programming over all cuts.
    """
    workers = workers or [1] * stages
    total = list(itertools.accumulate(costs, initial=0.0))
    blocks = len(costs)
    # best[k][i]: (cost of the slowest of k stages, sum of squared counts) for the first i blocks, with the last cut.
    best: list[list[tuple[float, int, int]]] = [
        [(float("inf"), 0, 0)] * (blocks + 1) for _ in range(stages + 1)
    ]
    best[0][0] = (0.0, 0, 0)
    for k in range(1, stages + 1):
        for i in range(k, blocks + 1):
            best[k][i] = min(
                (
                    max(best[k - 1][j][0], (total[i] - total[j]) / workers[k - 1]),
                    best[k - 1][j][1] + (i - j) ** 2,
                    j,
                )
                for j in range(k - 1, i)
            )
    counts: list[int] = []
    end = blocks
    for k in range(stages, 0, -1):
        start = best[k][end][2]
        counts.append(end - start)
        end = start
    return counts[::-1]
