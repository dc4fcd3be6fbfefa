"""What a stage remembers of an item while it carries out the item's actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scpl_dist.control.items import Computed, Train, to_plain
from scpl_dist.data.loader import Batch
from scpl_dist.methods.block import Carry
from scpl_dist.methods.schedule import Action
from scpl_dist.transport import Envelope


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on its way through the blocks of a stage.

    Attributes:
        carry: output of the newest forward pass, without history.
        weight: share of the micro-batch in the item, 0 to 1.
        before: by block, its input; kept until its backward pass.
        after: by block, its output with history; likewise.
        seen: by block, what its objective sees of all replicas' samples, and their labels; only with replicas.
        losses: by block, the terms of its objective.
        back: what travels back: gradients of the floating-point tensors of the newest carry, or an answer.
    """

    carry: Carry
    labels: Tensor
    weight: float
    before: dict[int, Carry] = field(default_factory=dict)
    after: dict[int, Carry] = field(default_factory=dict)
    seen: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    losses: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    back: list[Tensor] = field(default_factory=list)


class ItemInProgress:
    """One item in progress.

    Attributes:
        plain: the item as it travels; equal wherever it is, so a message can be checked to belong to it.
        again: blocks whose activations are not kept, but computed again for the backward pass.
        flows: by micro-batch.
        losses: terms by block, summed over the micro-batches with their weights.
        metrics: sum and count of each metric so far; sums are tensors, so that a GPU is not waited for.
    """

    def __init__(
        self, item: Computed, batches: Iterator[Batch], received: Envelope | None, training: bool
    ) -> None:
        self.item = item
        self.plain = to_plain(item) if received is None else received.item
        self.batches = batches
        self.received = received
        self.training = training
        self.again: set[int | None] = set()
        self.flows: dict[int, MicroBatch] = {}
        self.losses: dict[str, dict[str, float]] = {}
        self.metrics: dict[str, tuple[Tensor, int]] = {}
        self.sizes = [stop - start for start, stop in item.micro_batches]

    @property
    def train(self) -> Train:
        """The item, which is one to train."""
        assert isinstance(self.item, Train)
        return self.item

    def flow(self, action: Action) -> tuple[MicroBatch, int, int]:
        """Micro-batch, number of the block and number of the micro-batch of an action."""
        assert action.block is not None
        assert action.micro_batch is not None
        return self.flows[action.micro_batch], action.block, action.micro_batch
