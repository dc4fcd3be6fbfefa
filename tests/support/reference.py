"""The oracle of the exactness tests: each method as a plain loop in one process, without executor and schedules.

Stages are here only where a narrow wire between them rounds.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from scpl_dist import data
from scpl_dist.coordinator import item_sequence
from scpl_dist.coordinator.learning_rate import LearningRate
from scpl_dist.data import sampling
from scpl_dist.methods.block import TrainableBlock, detached
from scpl_dist.plan.plan import Plan
from scpl_dist.run import seeds
from scpl_dist.run.config import Config, Schedule


@dataclass
class Reference:
    """Result of `train`.

    Attributes:
        losses: {(step, block): {term: value}}.
        accuracy: test accuracy after each epoch.
        metrics: of the test part after each epoch, where they are wanted; see `scpl_dist.run.scores.values`.
        trainables: the trained blocks and heads.
        averages: the same with averaged weights, if there are such.
    """

    losses: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    trainables: dict[int, TrainableBlock] = field(default_factory=dict)
    averages: dict[int, AveragedModel] = field(default_factory=dict)


def train(config: Config) -> Reference:
    """Train on every batch, block by block with local losses, or end to end by one graph through all blocks."""
    torch.set_num_threads(config.runtime.threads)
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    result = Reference(trainables=plan.trainables(range(len(plan.parameters))))
    optimizers = {block: _optimizers(config, trainable) for block, trainable in result.trainables.items()}
    size, group = source.sizes["train"], config.optimizer.accumulate
    steps_per_epoch = math.ceil(size / config.data.batch_size)
    if config.data.drop_last:
        steps_per_epoch = size // config.data.batch_size
    weights = sampling.weights_of(config, source)
    rate = LearningRate(config, steps_per_epoch)
    step = 0
    for epoch in range(config.run.epochs):
        turn = math.pi * (epoch * steps_per_epoch) / (config.run.epochs * steps_per_epoch)
        lr = config.optimizer.end_lr + (config.optimizer.lr - config.optimizer.end_lr) * 0.5 * (
            1 + math.cos(turn)
        )
        order = sampling.permutation(config.run.seed, epoch, size)
        if weights is not None:
            order = sampling.draws(weights, config.run.seed, epoch)
        batches = torch.split(order, config.data.batch_size)[:steps_per_epoch]
        for number, indices in enumerate(batches):
            if config.schedule != Schedule():
                lr = rate(step)
            for optimizer in itertools.chain.from_iterable(optimizers.values()):
                for settings in optimizer.param_groups:
                    settings["lr"] = lr * settings.get("lr_scale", 1.0)
            frozen = config.frozen(epoch)
            for block, trainable in result.trainables.items():
                trainable.train()
                if block in frozen:
                    trainable.block.eval()
                    trainable.heads.eval()
                    trainable.requires_grad_(False)
            together = min(group, len(batches) - number // group * group)  # batches of this update
            last = (number + 1) % group == 0 or number + 1 == len(batches)
            loop = _Loop(plan, result, optimizers, step, 1 / together, last, frozen)
            cuts = item_sequence.split(0, len(indices), config.pipeline.micro_batches)
            if plan.method.local and len(cuts) == 1:
                _local_step(loop, source.batch("train", epoch, indices))
            else:
                parts = [source.batch("train", epoch, indices[a:b]) for a, b in cuts]
                (_compared_step if plan.method.local else _end_to_end_step)(loop, parts)
            step += 1
        with _averaged(result):
            result.accuracy.append(evaluate(plan, source, result.trainables))
    return result


@dataclass
class _Loop:
    """A step of the loop: what it works with, the share of its batch in an update, and whether that follows."""

    plan: Plan
    result: Reference
    optimizers: dict[int, list[torch.optim.Optimizer]]
    step: int
    share: float
    last: bool
    frozen: frozenset[int]


def _optimizers(config: Config, trainable: TrainableBlock) -> list[torch.optim.Optimizer]:
    settings = config.optimizer
    kinds = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    args = ({"fused": True} if settings.name == "adam" else {}) | settings.args
    found = []
    for path in trainable.parameter_groups():
        groups = [path]
        if not settings.decay_norms:
            matrices = [one for one in path["params"] if one.ndim > 1]
            vectors = [one for one in path["params"] if one.ndim <= 1]
            groups = [{**path, "params": matrices}, {**path, "params": vectors, "weight_decay": 0.0}]
        if path["params"]:
            found.append(kinds[settings.name](groups, **args))
    return found


Batch = tuple[Any, Tensor]


def _local_step(loop: _Loop, batch: Batch) -> None:
    """One block after the other; the gradient of a block ends at its input."""
    labels = batch[1]
    x = loop.plan.method.carry(*batch)
    for block, trainable in loop.result.trainables.items():
        _seed(loop.plan, block, loop.step, 0)
        output = trainable(x)
        if block in loop.frozen:
            x = travelled(loop.plan, block, output)
            continue
        terms = trainable.losses(x, output, labels)
        torch.autograd.backward(torch.stack(list(terms.values())).sum() * loop.share)
        if loop.last:
            limit = loop.plan.config.optimizer.clip_norm
            if limit:
                torch.nn.utils.clip_grad_norm_(trainable.parameters(), limit)
            _update(loop, block)
        loop.result.losses[loop.step, block] = {name: term.item() for name, term in terms.items()}
        x = travelled(loop.plan, block, detached(output))


def _compared_step(loop: _Loop, parts: list[Batch]) -> None:
    """The same with a loss of all parts of a batch together; their graphs are kept, and nothing is computed again."""
    labels = torch.cat([labels for _, labels in parts])
    carries = [loop.plan.method.carry(*part) for part in parts]
    for block, trainable in loop.result.trainables.items():
        embedded = []
        for m, x in enumerate(carries):
            _seed(loop.plan, block, loop.step, m)
            carries[m] = travelled(loop.plan, block, detached(output := trainable(x)))
            embedded.append(trainable.embed(x, output))
        leaves = [{name: one.detach().requires_grad_() for name, one in part.items()} for part in embedded]
        together = {name: torch.cat([part[name] for part in leaves]) for name in leaves[0]}
        terms = trainable.loss_terms(together, labels)
        torch.autograd.backward(torch.stack(list(terms.values())).sum() * loop.share)
        for part, leaf in zip(embedded, leaves, strict=True):
            torch.autograd.backward(list(part.values()), [leaf[name].grad for name in part])
        if loop.last:
            _update(loop, block)
        loop.result.losses[loop.step, block] = {name: term.item() for name, term in terms.items()}


def _end_to_end_step(loop: _Loop, parts: list[Batch]) -> None:
    """All micro-batches forward through one graph, backward in the order of the schedule, then one update."""
    plan, result, step = loop.plan, loop.result, loop.step
    trainables, total = result.trainables, sum(len(labels) for _, labels in parts)
    losses: list[tuple[Tensor, float]] = []
    for m, (x, labels) in enumerate(parts):
        for block, trainable in trainables.items():
            _seed(plan, block, step, m)
            x = travelled(plan, block, trainable(x))
        scores = trainables[len(trainables) - 1].predict(x)
        losses.append(
            (
                functional.cross_entropy(
                    scores.flatten(0, -2),
                    labels.flatten(),
                    label_smoothing=plan.config.task.label_smoothing,
                ),
                len(labels) / total,
            )
        )
    order = losses if plan.config.pipeline.schedule == "1f1b" else losses[::-1]
    noted = 0.0
    for loss, weight in order:
        torch.autograd.backward(loss * (weight * loop.share))
        noted += weight * loss.item()
    if loop.last:
        limit = plan.config.optimizer.clip_norm
        if limit:
            _clip_together(trainables, limit)
        for block in trainables.keys() - loop.frozen:
            _update(loop, block)
    result.losses[step, len(trainables) - 1] = {"classifier": noted}


class _Travels(torch.autograd.Function):
    """What a stage is sent, and the gradient that it sends back."""

    @staticmethod
    def forward(context: Any, value: Tensor, wire: str) -> Tensor:
        context.wire = wire
        return rounded(value, wire)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return rounded(gradients[0], context.wire), None


def travelled(plan: Plan, block: int, value: Any) -> Any:
    """What is on one side of a block's end, as it arrives at the other side, where stages meet there."""
    wire = plan.config.pipeline.wire_dtype
    if wire == "float32" or block not in [spec.blocks[-1] for spec in plan.specs[:-1]]:
        return value

    def travels(leaf: Tensor) -> Tensor:
        return _Travels.apply(leaf, wire) if leaf.is_floating_point() else leaf

    return pytree.tree_map_only(Tensor, travels, value)


def rounded(value: Tensor, wire: str) -> Tensor:
    """Floats as `pipeline.wire_dtype` lets them arrive."""
    if wire != "int8":
        return value.to(getattr(torch, wire)).to(value.dtype)
    first = value.dim() - 1
    while first > 1 and math.prod(value.shape[first:]) < 64:
        first -= 1
    groups = value.reshape(*value.shape[:first], -1)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, (groups / scale).round(), 0.0)
    return (codes * scale).reshape(value.shape)


def _seed(plan: Plan, block: int, step: int, m: int) -> None:
    number = seeds.derive(plan.config.run.seed, "dropout", block, step, m)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def _clip_together(trainables: dict[int, TrainableBlock], limit: float) -> None:
    """By the length of the whole gradient, whose squares are added up block by block."""
    gradients = [
        [one.grad for one in own.parameters() if one.grad is not None] for own in trainables.values()
    ]
    squares = torch.stack([torch.nn.utils.get_total_norm(own).double().square() for own in gradients])
    whole = torch.nn.utils.get_total_norm([gradient for own in gradients for gradient in own])
    length = squares.sum().sqrt().float()
    torch.testing.assert_close(length, whole)  # torch's own, which adds up in another order
    for gradient in itertools.chain.from_iterable(gradients):
        gradient.mul_(torch.clamp(limit / (length + 1e-6), max=1.0))


def _update(loop: _Loop, block: int) -> None:
    value, decay = loop.plan.config.optimizer.clip_value, loop.plan.config.optimizer.ema
    trainable, averages = loop.result.trainables[block], loop.result.averages
    if value:
        torch.nn.utils.clip_grad_value_(trainable.parameters(), value)
    for optimizer in loop.optimizers[block]:
        optimizer.step()
        optimizer.zero_grad()
    if decay and block not in averages:
        averages[block] = AveragedModel(trainable, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    if decay:
        averages[block].update_parameters(trainable)


@contextlib.contextmanager
def _averaged(result: Reference) -> Iterator[None]:
    """The averaged weights in place of those that learn, if there are such."""
    kept = {block: copy.deepcopy(result.trainables[block].state_dict()) for block in result.averages}
    for block, average in result.averages.items():
        for own, other in zip(result.trainables[block].parameters(), average.parameters(), strict=True):
            own.detach().copy_(other)
    yield
    for block, state in kept.items():
        result.trainables[block].load_state_dict(state)


@torch.no_grad()
def evaluate(plan: Plan, source: data.DataSource, trainables: dict[int, TrainableBlock]) -> float:
    """Test accuracy: through all blocks, and back through the decoders if the method has some."""
    correct = total = 0
    for trainable in trainables.values():
        trainable.eval()
    for indices in torch.split(torch.arange(source.sizes["test"]), plan.config.data.batch_size):
        x, labels = source.batch("test", 0, indices)
        carry = plan.method.carry(x, labels)
        for block, trainable in trainables.items():
            carry = travelled(plan, block, trainable(carry))
        answer = trainables[len(trainables) - 1].predict(carry)
        if plan.config.run.method == "al":
            for block, trainable in reversed(trainables.items()):
                answer = travelled(plan, block - 1, trainable.decode(answer))
        correct += int((answer.argmax(-1) == labels).sum())
        total += labels.numel()
    return correct / total


def tensors(trainables: dict[int, TrainableBlock]) -> dict[str, Tensor]:
    """Weights under the names of an export."""
    return {
        f"{part}.{block}.{name}": tensor
        for block, trainable in trainables.items()
        for part, module in (("blocks", trainable.block), ("heads", trainable.heads))
        for name, tensor in module.state_dict().items()
    }
