"""What a stage remembers of an item while it carries out the item's actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scpl_dist.control.items import Computed, Train, to_plain
from scpl_dist.data.loader import Batch
from scpl_dist.methods.block import Carry
from scpl_dist.methods.metrics import Metric
from scpl_dist.transport import Envelope


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on its way through the blocks of a stage; dicts are by block."""

    carry: Carry  # output of the newest forward pass, without history
    labels: Tensor
    weight: float  # share of the micro-batch in the item's loss, 0 to 1
    before: dict[int, Carry] = field(default_factory=dict)  # inputs, kept until the backward pass
    after: dict[int, Carry] = field(default_factory=dict)  # outputs with history; likewise
    # What the objective sees of all replicas' samples, and their labels: with replicas, or of all micro-batches, where
    # it has no history, and gets the gradient.
    seen: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    losses: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # terms of the objective
    # What travels back: gradients of the floating-point tensors of the newest carry, or an answer.
    back: list[Tensor] = field(default_factory=list)


class ItemInProgress:
    """One item in progress: its batches on stage 0, the message that announced it on all others."""

    def __init__(self, item: Computed, batches: Iterator[Batch], received: Envelope | None) -> None:
        self.item = item
        # As it travels: equal wherever it is, so a message can be checked to belong to it.
        self.plain = to_plain(item) if received is None else received.item
        self.batches = batches
        self.received = received
        self.training = isinstance(item, Train)
        self.sizes = [stop - start for start, stop in item.micro_batches]
        self.again: set[int] = set()  # blocks whose activations are computed again for the backward pass
        self.frozen: frozenset[int] = frozenset()  # blocks that do not learn
        self.passed: set[int] = set()  # blocks that have no backward pass
        self.first = 0  # block of the model that learns
        self.flows: dict[int, MicroBatch] = {}
        self.weights: list[float] = []  # of the micro-batches, where stage 0 has looked at their labels
        # Squares of the lengths of the gradients of this stage's blocks and all behind, float64, (blocks,) in their
        # order; and then the length of the whole model's, a scalar.
        self.squares: Tensor | None = None
        self.norm: Tensor | None = None
        self.metrics: dict[str, Metric] = {}  # of an evaluation, where the answers are counted

    def start(self, m: int, carry: Carry, labels: Tensor, weight: float | None = None) -> None:
        """A `weight` is that of its tokens; without one all samples count alike."""
        self.flows[m] = MicroBatch(
            carry, labels, self.sizes[m] / sum(self.sizes) if weight is None else weight
        )

    def weigh(self, counted: Callable[[Tensor], int]) -> None:
        """Look at the labels of all micro-batches before the first one starts, which needs its share of them."""
        batches = list(self.batches)
        counts = [counted(labels) for _, labels in batches]
        self.weights = [count / max(1, sum(counts)) for count in counts]
        self.batches = iter(batches)

    @property
    def train(self) -> Train:
        assert isinstance(self.item, Train)
        return self.item
