"""As many stages and replicas as there are workers for, and who stays where."""

from __future__ import annotations

from typing import Any

import pytest

from scpl_dist.coordinator import lineup
from scpl_dist.coordinator.members import Member
from scpl_dist.run.layout import Layout
from tests.coordinator.test_roster import member
from tests.support.coordinator import small


def placed(layout: Layout, *places: tuple[int, int] | None) -> list[Member]:
    """Workers that had these places; None is a newcomer."""
    found = []
    for number, place in enumerate(places):
        worker = member(100 + number, None)
        if place is not None:
            worker.worker = layout.workers[layout.rank(*place)]
        found.append(worker)
    return found


@pytest.mark.parametrize(
    ("values", "count", "shape"),
    [
        ({}, 3, [1, 1, 1]),
        ({}, 4, [1, 1, 1]),
        ({}, 2, None),
        ({"pipeline__elastic": [2, 4]}, 1, None),
        ({"pipeline__elastic": [2, 4]}, 2, [1, 1]),
        ({"pipeline__elastic": [2, 4]}, 9, [1, 1, 1, 1]),
        ({"pipeline__stages": 2, "pipeline__replicas": 2}, 3, None),
        ({"pipeline__stages": 2, "pipeline__replicas": 2, "pipeline__elastic": [2, 2]}, 1, None),
        ({"pipeline__stages": 2, "pipeline__replicas": 2, "pipeline__elastic": [2, 2]}, 2, [1, 1]),
        ({"pipeline__stages": 2, "pipeline__replicas": 2, "pipeline__elastic": [2, 2]}, 5, [2, 2]),
    ],
)
def test_as_many_stages_as_there_are_workers_for(
    values: dict[str, Any], count: int, shape: list[int] | None
) -> None:
    config = small(**values)
    assert lineup.shape(config, placed(config.layout, *[None] * count)) == shape


@pytest.mark.parametrize(
    ("places", "shape"),
    [
        ([(0, 0), (1, 0), (1, 1)], [1, 2]),  # the stage that lost one shrinks
        ([(1, 0), (1, 1)], [1, 1]),  # a stage that lost all is given one
        ([(0, 0), (0, 1), None], [2, 1]),
        ([(0, 1), (1, 1), None], [2, 1]),  # of equal need the first
    ],
)
def test_a_lost_replica_only_shrinks_its_stage(
    places: list[tuple[int, int] | None], shape: list[int]
) -> None:
    config = small(pipeline__stages=2, pipeline__replicas=2, pipeline__elastic=[2, 2])
    assert lineup.shape(config, placed(config.layout, *places)) == shape


def pids(found: dict[int, Member]) -> list[int]:
    return [found[rank].hello.pid for rank in sorted(found)]


def test_whoever_had_a_place_keeps_it_and_a_newcomer_gets_the_open_one() -> None:
    layout = Layout([1, 1, 1])
    there = placed(layout, None, (2, 0), (0, 0))
    assert pids(lineup.assigned(there, layout, same=True)) == [102, 100, 101]


def test_in_another_number_of_stages_workers_keep_their_order() -> None:
    there = placed(Layout([1] * 4), (3, 0), None, (0, 0), (2, 0))
    assert pids(lineup.assigned(there, Layout([1] * 3), same=False)) == [102, 103, 100]
    assert pids(lineup.assigned(there, Layout([1] * 4), same=False)) == [102, 103, 100, 101]


def test_a_newcomer_gets_what_it_was_started_for_if_that_is_open() -> None:
    layout = Layout([1, 1, 1])
    there = [member(100, 2), member(101, 7), member(102, 2), member(103, None)]
    found = lineup.assigned(there, layout, same=True)
    assert found[2].hello.pid == 100
    assert sorted(pids(found)) == [100, 101, 102]
