"""A worker's neighbours as the executor sees them: stages, whatever number of workers holds each.

Where two stages have different numbers of replicas, a micro-batch is cut and joined on its way. The numbers of the
samples that a worker needs follow from the size of the micro-batch, which both ends know, so nothing else has to be
sent:

    stage 0                      stage 1 (2 replicas)         stage 2 (3 replicas)
    samples 0..11 ---- 0..5 ---> replica 0 ----- 0..3 ------> replica 0
                  |                        `---- 4..5 -----.
                  `--- 6..11 --> replica 1 ----- 6..7 ------+-> replica 1
                                           `---- 8..11 ------> replica 2

With one worker a stage nothing is cut, joined or copied.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.run.layout import Layout, WorkerId, share
from scpl_dist.transport import Envelope, Transport


class Neighbours:
    """See the module. What waits or sends raises as `Transport` does."""

    def __init__(self, transport: Transport, layout: Layout, worker_id: WorkerId) -> None:
        self.transport = transport
        self._worker_id = worker_id
        self._routes = functools.cache(layout.routes)
        stages = (worker_id.stage - 1, worker_id.stage + 1)
        self._ranks = {stage: layout.ranks(stage) if 0 <= stage < layout.stages else [] for stage in stages}
        self._lead = layout.lead(worker_id.stage - 1, worker_id) if worker_id.stage else None
        self._led = [
            rank
            for rank in self._ranks[worker_id.stage + 1]
            if layout.lead(worker_id.stage, layout.workers[rank]) == worker_id.rank
        ]

    def own(self, size: int) -> tuple[int, int]:
        """The samples that this worker has of a micro-batch of `size`: the first one, and the one after the last."""
        return share(size, self._worker_id.replicas, self._worker_id.replica)

    def next(self) -> Envelope:
        """The first message of the next item, from the stage before."""
        assert self._lead is not None
        return self.transport.receive(self._lead)

    def wait_for_room(self, stage: int) -> None:
        """Wait until every worker of a neighbouring stage may be sent a message."""
        for rank in self._ranks[stage]:
            self.transport.wait_for_room(rank)

    def pass_on(self, marker: dict[str, Any]) -> None:
        for rank in self._led:
            self.transport.post(rank, Envelope(marker))

    def post(
        self,
        stage: int,
        item: dict[str, Any],
        micro_batch: int,
        size: int,
        payload: Any,
        weight: float | None = None,
    ) -> None:
        """Send this worker's part of a micro-batch of `size` to a stage, sample first; see `Transport.post`."""
        routes = self._routes(self._worker_id.stage, stage, size)
        mine = [route for route in routes if route.sender == self._worker_id.rank]
        start, end = self.own(size)
        for route in mine:
            part = payload
            if len(mine) > 1:
                part = _rows(payload, route.begin - start, route.end - start, end - start)
            self.transport.post(route.receiver, Envelope(item, micro_batch, part, weight))

    def receive(
        self, stage: int, item: dict[str, Any], micro_batch: int, size: int, first: Envelope | None = None
    ) -> Envelope:
        """This worker's part of a micro-batch of `size`; `first` is the message with which `next` announced it."""
        parts: list[Envelope] = []
        for route in self._routes(stage, self._worker_id.stage, size):
            if route.receiver == self._worker_id.rank:
                announced = first is not None and route.sender == self._lead
                message = first if announced else self.transport.receive(route.sender)
                assert message is not None
                assert (message.item, message.micro_batch) == (item, micro_batch)
                parts.append(message)
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], payload=pytree.tree_map(_joined, *(part.payload for part in parts)))


def _rows(payload: Any, begin: int, end: int, size: int) -> Any:
    """Samples of a part; a sample may have several rows, such as two views."""

    def cut(leaf: Tensor) -> Tensor:
        rows = len(leaf) // size
        return leaf[begin * rows : end * rows].clone()  # without the rest, which would travel with it

    return pytree.tree_map_only(Tensor, cut, payload)


def _joined(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
