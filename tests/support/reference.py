"""The oracle of the exactness tests: each method as a plain loop in one process, without executor and schedules."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scpl_dist import data
from scpl_dist.coordinator import item_sequence
from scpl_dist.data import sampling
from scpl_dist.methods.block import TrainableBlock, detached
from scpl_dist.plan.plan import Plan
from scpl_dist.run import seeds
from scpl_dist.run.config import Config


@dataclass
class Reference:
    """Result of `train`.

    Attributes:
        losses: {(step, block): {term: value}}.
        accuracy: test accuracy after each epoch.
        units: the trained blocks and heads.
    """

    losses: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)
    trainables: dict[int, TrainableBlock] = field(default_factory=dict)


def train(config: Config) -> Reference:
    """Train on every batch, block by block with local losses, or end to end by one graph through all blocks."""
    torch.set_num_threads(config.runtime.threads)
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    result = Reference(trainables=plan.trainables(range(len(plan.parameters))))
    adams: Adams = {
        block: [
            torch.optim.Adam([path], fused=True) for path in trainable.parameter_groups() if path["params"]
        ]
        for block, trainable in result.trainables.items()
    }
    size = source.sizes["train"]
    steps_per_epoch = math.ceil(size / config.data.batch_size)
    if config.data.drop_last:
        steps_per_epoch = size // config.data.batch_size
    weights = sampling.weights_of(config, source)
    step = 0
    for epoch in range(config.run.epochs):
        turn = math.pi * (epoch * steps_per_epoch) / (config.run.epochs * steps_per_epoch)
        lr = config.optimizer.end_lr + (config.optimizer.lr - config.optimizer.end_lr) * 0.5 * (
            1 + math.cos(turn)
        )
        order = sampling.permutation(config.run.seed, epoch, size)
        if weights is not None:
            order = sampling.draws(weights, config.run.seed, epoch)
        for indices in torch.split(order, config.data.batch_size)[:steps_per_epoch]:
            for optimizer in itertools.chain.from_iterable(adams.values()):
                optimizer.param_groups[0]["lr"] = lr * optimizer.param_groups[0].get("lr_scale", 1.0)
            for trainable in result.trainables.values():
                trainable.train()
            if plan.method.local:
                _local_step(plan, result, adams, step, source.batch("train", epoch, indices))
            else:
                cuts = item_sequence.split(0, len(indices), config.pipeline.micro_batches)
                parts = [source.batch("train", epoch, indices[a:b]) for a, b in cuts]
                _end_to_end_step(plan, result, adams, step, parts)
            step += 1
        result.accuracy.append(evaluate(plan, source, result.trainables))
    return result


Adams = dict[int, list[torch.optim.Optimizer]]
Batch = tuple[Any, Tensor]


def _local_step(plan: Plan, result: Reference, adams: Adams, step: int, batch: Batch) -> None:
    """One block after the other; the gradient of a block ends at its input."""
    labels = batch[1]
    x = plan.method.carry(*batch)
    for block, trainable in result.trainables.items():
        _seed(plan, block, step, 0)
        output = trainable(x)
        terms = trainable.losses(x, output, labels)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        _update(adams[block])
        result.losses[step, block] = {name: term.item() for name, term in terms.items()}
        x = detached(output)


def _end_to_end_step(plan: Plan, result: Reference, adams: Adams, step: int, parts: list[Batch]) -> None:
    """All micro-batches forward through one graph, backward in the order of the schedule, then one update."""
    trainables, total = result.trainables, sum(len(labels) for _, labels in parts)
    losses: list[tuple[Tensor, float]] = []
    for m, (x, labels) in enumerate(parts):
        for block, trainable in trainables.items():
            _seed(plan, block, step, m)
            x = trainable(x)
        losses.append(
            (
                functional.cross_entropy(trainables[len(trainables) - 1].predict(x), labels),
                len(labels) / total,
            )
        )
    order = losses if plan.config.pipeline.schedule == "1f1b" else losses[::-1]
    noted = 0.0
    for loss, weight in order:
        torch.autograd.backward(loss if weight == 1 else loss * weight)
        noted += weight * loss.item()
    for optimizers in adams.values():
        _update(optimizers)
    result.losses[step, len(trainables) - 1] = {"classifier": noted}


def _seed(plan: Plan, block: int, step: int, m: int) -> None:
    number = seeds.derive(plan.config.run.seed, "dropout", block, step, m)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def _update(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(plan: Plan, source: data.DataSource, trainables: dict[int, TrainableBlock]) -> float:
    """Test accuracy: through all blocks, and back through the decoders if the method has some."""
    correct = 0
    for trainable in trainables.values():
        trainable.eval()
    for indices in torch.split(torch.arange(source.sizes["test"]), plan.config.data.batch_size):
        x, labels = source.batch("test", 0, indices)
        carry = plan.method.carry(x, labels)
        for trainable in trainables.values():
            carry = trainable(carry)
        answer = trainables[len(trainables) - 1].predict(carry)
        if plan.config.run.method == "al":
            for trainable in reversed(trainables.values()):
                answer = trainable.decode(answer)
        correct += int((answer.argmax(1) == labels).sum())
    return correct / source.sizes["test"]


def tensors(trainables: dict[int, TrainableBlock]) -> dict[str, Tensor]:
    """Weights under the names of an export."""
    return {
        f"{part}.{block}.{name}": tensor
        for block, trainable in trainables.items()
        for part, module in (("blocks", trainable.block), ("heads", trainable.heads))
        for name, tensor in module.state_dict().items()
    }
