"""GPipe (arXiv 1811.06965): back-propagation with the batch cut into micro-batches that fill the pipeline.

    gpipe, 2 stages, 3 micro-batches            1f1b, the same
    stage 0  F0 F1 F2 .  .  .  B2 B1 B0         stage 0  F0 F1 .  B0 F2 .  B1 B2      (backward passes drawn short)
    stage 1  .  F0 F1 F2 B2 B1 B0               stage 1  .  F0 B0 F1 B1 F2 B2

Both make one update a batch with the gradient of the whole batch, a weighted mean over the micro-batches, so weights
are never stale; both pay a bubble of (stages - 1) / (micro_batches + stages - 1). "1f1b" keeps at most as many
micro-batches alive in a stage as there are stages behind it, itself included; "gpipe" keeps all.

BatchNorm normalises with the statistics of the micro-batch, so with it the gradient is *not* that of the whole batch.
``pipeline.deferred_batch_norm`` repairs its running averages only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from scpl_dist.methods.base import forward
from scpl_dist.methods.batchnorm import defer
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.bp import BackPropagation, backward, update
from scpl_dist.methods.schedule import Action, StageSpec
from scpl_dist.methods.task import Task
from scpl_dist.run.config import Config


class GPipe(BackPropagation):
    name = "gpipe"
    schedules = True
    whole = ""

    def __init__(self, config: Config, num_blocks: int, task: Task) -> None:
        super().__init__(config, num_blocks, task)
        pipeline = config.pipeline
        if pipeline.deferred_batch_norm and config.layout.world > pipeline.stages:
            raise ValueError(
                f"pipeline.replicas = {pipeline.replicas}: replicas share BatchNorm's statistics of each micro-batch, "
                "and pipeline.deferred_batch_norm = true keeps them for the whole batch; use one of the two"
            )

    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        if self.config.pipeline.deferred_batch_norm:
            defer(block)
        return super().trainable(index, block, before, after)

    def train(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        """Backward passes in reverse order, or each as soon as the stage behind can have sent it."""
        # ahead  micro-batches that go forward before the first one comes back
        # order  in which they come back
        #
        # stage 0 of 3, 4 micro-batches     ahead  order    program
        # gpipe                             4      3 2 1 0  F0 F1 F2 F3  B3 B2 B1 B0
        # 1f1b                              2      0 1 2 3  F0 F1  F2 B0  F3 B1  B2 B3
        again = self.config.pipeline.recompute
        order = iter(range(micro_batches))
        ahead = min(spec.stages - 1 - spec.stage, micro_batches)
        if self.config.pipeline.schedule == "gpipe":
            order = reversed(range(micro_batches))
            ahead = micro_batches
        for m in range(ahead):
            yield from forward(spec, m)
        for m in range(ahead, micro_batches):
            yield from forward(spec, m)
            yield from backward(spec, next(order), again)
        for m in order:
            yield from backward(spec, m, again)
        yield from update(spec)
