"""Micro-batches on their way between stages with different numbers of replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scpl_dist.run.layout import Layout, share
from scpl_dist.transport import Envelope
from scpl_dist.transport.neighbours import Neighbours
from tests.support.pipelines import LocalTransport


class Impatient(LocalTransport):
    """An empty lane is an error instead of a wait."""

    def _wait(self, ready: Callable[[], bool]) -> None:
        assert ready()


def neighbours(layout: Layout) -> list[Neighbours]:
    """Of all workers, by rank."""
    ends: list[LocalTransport] = []
    ends += (Impatient(rank, ends) for rank in range(layout.world))
    return [Neighbours(end, layout, layout.workers[end.rank]) for end in ends]


ITEM = {"whatever": "it is"}


def rows(size: int, views: int) -> dict[str, Any]:
    """A carry whose values say which row of which micro-batch they belong to."""
    return {
        "image": torch.arange(size * views * 4.0).reshape(-1, 2, 2),
        "more": (torch.arange(size * views), None),
    }


def part(value: Any, size: int, views: int, replicas: int, replica: int) -> Any:
    begin, end = (views * edge for edge in share(size, replicas, replica))
    return {"image": value["image"][begin:end], "more": (value["more"][0][begin:end], None)}


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one["image"], other["image"]) and torch.equal(one["more"][0], other["more"][0])


REPLICAS = st.lists(st.integers(1, 5), min_size=3, max_size=3)


@given(REPLICAS, st.integers(0, 20), st.integers(0, 20), st.integers(1, 2))
def test_every_worker_gets_its_rows_whatever_the_numbers(
    replicas: list[int], one: int, other: int, views: int
) -> None:
    layout = Layout(replicas)
    links = neighbours(layout)
    sizes = [max(replicas) + one, max(replicas) + other]
    marker = {"what": "comes next"}
    for stage in (0, 1):
        for rank in layout.ranks(stage):
            for m, size in enumerate(sizes):
                own = part(rows(size, views), size, views, replicas[stage], layout.workers[rank].replica)
                links[rank].post(stage + 1, ITEM, m, size, own, 0.5 * m)
            links[rank].pass_on(marker)
        for rank in layout.ranks(stage + 1):
            first: Envelope | None = links[rank].next()
            assert first is not None
            assert (first.item, first.micro_batch) == (ITEM, 0)
            for m, size in enumerate(sizes):
                wanted = part(
                    rows(size, views), size, views, replicas[stage + 1], layout.workers[rank].replica
                )
                found = links[rank].receive(stage, ITEM, m, size, first if m == 0 else None)
                assert equal(found.payload, wanted)
                assert found.weight == 0.5 * m
            assert links[rank].next().item == marker
    for m, size in enumerate(sizes):  # and back
        for rank in layout.ranks(2):
            own = part(rows(size, views), size, views, replicas[2], layout.workers[rank].replica)
            links[rank].post(1, ITEM, m, size, own)
        for rank in layout.ranks(1):
            wanted = part(rows(size, views), size, views, replicas[1], layout.workers[rank].replica)
            assert equal(links[rank].receive(2, ITEM, m, size).payload, wanted)
    assert not any(link.transport.queued() for link in links), "a message was not received"


def test_one_worker_a_stage_gets_the_very_tensors() -> None:
    first, second = neighbours(Layout([1, 1]))
    sent: Tensor = torch.ones(3, 2)
    first.post(1, ITEM, 0, 3, (sent, sent))
    assert second.receive(0, ITEM, 0, 3).payload[0] is sent
