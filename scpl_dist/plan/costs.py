"""How long each block takes: the measure behind ``pipeline.partition = "measured"``.

It is taken once, by the process that starts the run, which writes the block counts into the run's configuration. Two
processes that measured for themselves would not come to the same stages.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.data import DataSource
from scpl_dist.methods.block import TrainableBlock, detached, floating, make_optimizers
from scpl_dist.plan import partition
from scpl_dist.plan.plan import Plan, place_units

REPEATS = 3


def counts(plan: Plan, source: DataSource) -> list[int]:
    """Blocks of each stage such that the slowest stage, its replicas considered, is as fast as possible."""
    stages = plan.config.pipeline.stages
    if stages in (1, len(plan.parameters)):
        return partition.balanced([1.0] * len(plan.parameters), stages)
    return partition.balanced(measure(plan, source), stages, plan.config.layout.replicas)


def measure(plan: Plan, source: DataSource) -> list[float]:
    """Seconds of one training step of each block: forward, loss, backward, update; the shortest of a few.

    Args:
        plan: the run; its places do not matter.
        source: the data, of which the first batch is used.
    """
    config = plan.config
    cuda = config.runtime.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.runtime.threads)
    try:
        size = min(config.data.batch_size, source.sizes["train"])
        inputs, labels = source.batch("train", 0, torch.arange(size))
        carry = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), plan.method.carry(inputs, labels))
        seconds: list[float] = []
        for index in range(len(plan.parameters)):
            trainables = plan.trainables([index])
            place_units(trainables, device)
            trainable = trainables[index].train()
            best = min(_step(plan, index, trainable, carry, labels.to(device)) for _ in range(REPEATS + 1))
            seconds.append(best)
            with torch.no_grad():
                carry = detached(trainable(carry))
        return seconds
    finally:
        torch.set_num_threads(threads)


def _step(plan: Plan, index: int, trainable: TrainableBlock, carry: Any, labels: Tensor) -> float:
    optimizers = make_optimizers(trainable, plan.config)
    local = plan.method.local
    if not local and index > 0:
        carry = pytree.tree_map_only(
            Tensor, lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), carry
        )
    begin = _now(labels.device)
    after = trainable(carry)
    if local or index == len(plan.parameters) - 1:
        terms = trainable.losses(carry, after, labels)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
    else:
        reached = [leaf for leaf in floating(after) if leaf.requires_grad]
        if reached:
            torch.autograd.backward(reached, [torch.ones_like(leaf) for leaf in reached])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _now(labels.device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
