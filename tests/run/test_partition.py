from __future__ import annotations

import itertools
import random

import pytest

from scpl_dist.run.partition import balanced, split


def slowest(costs: list[float], counts: list[int]) -> float:
    return max(sum(costs[block] for block in held) for held in split(counts))


def test_split_gives_consecutive_ranges() -> None:
    assert split([1, 3]) == [range(1), range(1, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_has_a_faster_slowest_stage(seed: int) -> None:
    chance = random.Random(seed)
    costs = [chance.choice([0.0, 1.0, 2.5, 9.0]) for _ in range(chance.randint(1, 9))]
    stages = chance.randint(1, len(costs))
    counts = balanced(costs, stages)
    assert len(counts) == stages
    assert sum(counts) == len(costs)
    assert min(counts) >= 1
    every = (
        [end - start for start, end in itertools.pairwise([0, *cuts, len(costs)])]
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert slowest(costs, counts) == pytest.approx(min(slowest(costs, other) for other in every))


def test_equal_costs_are_spread_evenly() -> None:
    assert sorted(balanced([1.0] * 10, 4)) == [2, 2, 3, 3]
