"""Ranks, stages and replicas, and which samples travel between them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl_dist.run.layout import Layout, share

REPLICAS = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def places(layout: Layout) -> list[tuple[int, int]]:
    return [(worker_id.stage, worker_id.replica) for worker_id in layout.workers]


def test_with_equal_numbers_rank_r_is_stage_r_modulo_the_stages() -> None:
    layout = Layout([2, 2, 2])
    assert places(layout) == [(rank % 3, rank // 3) for rank in range(6)]
    assert [worker_id.label for worker_id in Layout([1, 2]).workers] == ["0", "1.0", "1.1"]


def test_stages_may_have_workers_of_different_numbers() -> None:
    layout = Layout([1, 3, 1])
    assert places(layout) == [(0, 0), (1, 0), (2, 0), (1, 1), (1, 2)]
    assert (layout.world, layout.stages, layout.ranks(1)) == (5, 3, [1, 3, 4])
    assert [layout.rank(stage, replica) for stage, replica in ((1, 2), (0, 1), (3, 0))] == [4, -1, -1]
    assert layout.links() == [(0, 1), (0, 3), (0, 4), (1, 2), (3, 2), (4, 2)]


@given(REPLICAS)
def test_the_first_ranks_are_the_first_workers_of_the_stages_and_each_place_is_taken_once(
    replicas: list[int],
) -> None:
    found = places(Layout(replicas))
    assert found[: len(replicas)] == [(stage, 0) for stage in range(len(replicas))]
    assert sorted(found) == [(stage, one) for stage, count in enumerate(replicas) for one in range(count)]


@pytest.mark.parametrize(("size", "replicas"), [(8, 3), (3, 3), (128, 1), (129, 2)])
def test_shares_follow_each_other_and_differ_by_one_at_most(size: int, replicas: int) -> None:
    parts = [share(size, replicas, replica) for replica in range(replicas)]
    assert [parts[0][0], parts[-1][1]] == [0, size]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    lengths = [end - begin for begin, end in parts]
    assert max(lengths) - min(lengths) <= 1


@given(REPLICAS, st.integers(0, 40))
def test_every_sample_takes_one_route_and_every_receiver_hears_from_its_lead(
    replicas: list[int], more: int
) -> None:
    layout = Layout(replicas)
    size = max(replicas) + more
    for source, target in ((0, 1), (1, 0)):
        routes = layout.routes(source, target, size)
        samples = sorted(sample for route in routes for sample in range(route.begin, route.end))
        assert samples == list(range(size))
        assert len({(route.sender, route.receiver) for route in routes}) == len(routes)
    downstream = {(route.sender, route.receiver) for route in layout.routes(0, 1, size)}
    for receiver in layout.ranks(1):
        assert (layout.lead(0, layout.workers[receiver]), receiver) in downstream
