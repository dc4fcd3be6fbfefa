"""How many blocks each stage of the next group holds."""

from __future__ import annotations

import pytest

from scpl_dist.coordinator.balance import Balance
from scpl_dist.coordinator.block_counts import BlockCounts
from tests.support.coordinator import small


def test_a_group_of_as_many_stages_keeps_its_blocks_and_another_one_shares_them_evenly() -> None:
    counts = BlockCounts(small(pipeline__partition=[3, 2, 1]))
    assert counts.of_next([1, 1, 1]) == [3, 2, 1]
    assert counts.of_next([1, 1]) == [3, 3]
    assert counts.of_next([1, 2]) == [2, 4]


def test_wanted_counts_are_those_of_one_group() -> None:
    counts = BlockCounts(small(pipeline__partition=[2, 2, 2]))
    counts.wanted = [1, 2, 3]
    assert counts.of_next([1, 1, 1]) == [1, 2, 3]
    assert counts.of_next([1, 1, 1]) == [2, 2, 2]
    counts.wanted = [1, 2, 3]
    assert counts.of_next([1, 1]) == [3, 3]  # somebody was lost meanwhile


def test_only_a_group_that_was_formed_to_move_blocks_is_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = BlockCounts(small(pipeline__partition=[2, 2, 2]))
    moves: list[tuple[float, float]] = []
    monkeypatch.setattr(counts._balance, "moved", lambda now, pause_s: moves.append((now, pause_s)))
    for wanted, shape in (([], [1, 1, 1]), ([1, 2, 3], [1, 1, 1]), ([], [1, 1, 1]), ([1, 2, 3], [1, 1])):
        counts.wanted = wanted
        counts.of_next(shape)
        counts.goes_on(float(len(wanted)), 0.5)
    assert moves == [(3.0, 0.5)]


def test_before_anybody_has_built_blocks_the_cut_is_left_to_the_workers() -> None:
    counts = BlockCounts(small())
    assert counts.of_next([1, 1]) == []
    assert counts.shaped([1, 1], []).pipeline.partition == "uniform"
    assert counts.shaped([1, 1, 1], []).pipeline.partition == small().pipeline.partition
    config = counts.shaped([1, 1], [4, 2])
    assert (config.pipeline.stages, config.pipeline.partition) == (2, [4, 2])


def test_costs_are_used_only_if_those_of_all_blocks_are_known() -> None:
    balance = Balance()
    balance.learn({0: 3.0, 1: 1.0})
    assert balance.costs(2) == [3.0, 1.0]
    assert balance.costs(3) == [1.0, 1.0, 1.0]
