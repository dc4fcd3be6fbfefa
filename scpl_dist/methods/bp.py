"""Back-propagation through the whole network: one loss at its end.

On one stage this is the plain training loop. On several it is *naive model parallelism*: activations travel down,
gradients travel up, and only one stage works at a time.

    time       ------------------------------------------------->
    stage 0    LOAD F0 SEND_F                  RECV_B B0 STEP0
    stage 1            RECV_F F1 LOSS1 B1 SEND_B STEP1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from scpl_dist.methods.base import Method, forward
from scpl_dist.methods.batchnorm import commit
from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.methods.task import Task


class LinkUnit(TrainableBlock):
    """A block of a chain; the last one has the predictor and the only loss."""

    def __init__(self, block: nn.Module, heads: dict[str, nn.Module], task: Task) -> None:
        super().__init__(block, heads)
        self.task = task

    def embed(self, before: Carry, after: Carry) -> Tensor:
        return self.predict(after)

    def loss_terms(self, seen: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"classifier": self.task.loss(seen, labels)}

    def updated(self) -> None:
        commit(self.block)


class BackPropagation(Method):
    name = "bp"
    local = False
    reads = ()

    @property
    def whole(self) -> str:
        return 'the method bp takes a batch as a whole, its pipelined form is run.method = "gpipe"'

    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        last = index == self.num_blocks - 1
        return LinkUnit(block, {"predictor": self.task.head(block, after)} if last else {}, self.task)

    def train(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        for m in range(micro_batches):
            yield from forward(spec, m)
            yield from backward(spec, m, self.config.pipeline.recompute)
        yield from update(spec)


def backward(spec: StageSpec, m: int, recompute: bool = False) -> Iterator[Action]:
    """Gradients of micro-batch `m` back through a stage, from the loss or from the stage behind."""
    if not spec.last:
        yield Action(Kind.RECV_B, micro_batch=m)
    for block in reversed(spec.blocks):
        if recompute:
            yield Action(Kind.RECOMPUTE, block, m)
        if spec.last and block == spec.blocks[-1]:
            yield Action(Kind.LOSS, block, m)
        yield Action(Kind.BACKWARD, block, m)
    if not spec.first:
        yield Action(Kind.SEND_B, micro_batch=m)


def update(spec: StageSpec) -> Iterator[Action]:
    """All blocks of a stage, after its gradients have left."""
    return (Action(Kind.STEP, block) for block in spec.blocks)
