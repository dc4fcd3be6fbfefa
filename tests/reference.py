"""The oracle of the exactness tests: SCPL as a plain loop over the blocks, in one process, without the executor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scpl_dist import data, seeds
from scpl_dist.assembly import Assembly
from scpl_dist.config import Config
from scpl_dist.methods.unit import Unit


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
    units: dict[int, Unit] = field(default_factory=dict)


def train(config: Config) -> Reference:
    """Train all blocks one after the other on every batch; the gradient of a block ends at its input."""
    torch.set_num_threads(config.runtime.threads)
    source = data.resolve(config)
    plan = Assembly.plan(config, source.classes, source.example())
    result = Reference(units=plan.units(range(len(plan.parameters))))
    adams = {block: torch.optim.Adam(unit.parameters(), fused=True) for block, unit in result.units.items()}
    size = source.sizes["train"]
    steps_per_epoch = math.ceil(size / config.data.batch_size)
    step = 0
    for epoch in range(config.run.epochs):
        turn = math.pi * (epoch * steps_per_epoch) / (config.run.epochs * steps_per_epoch)
        lr = config.optimizer.end_lr + (config.optimizer.lr - config.optimizer.end_lr) * 0.5 * (
            1 + math.cos(turn)
        )
        for indices in torch.split(seeds.permutation(config.run.seed, epoch, size), config.data.batch_size):
            x, labels = source.batch("train", epoch, indices)
            for block, unit in result.units.items():
                unit.train()
                torch.manual_seed(seeds.derive(config.run.seed, "dropout", block, step, 0))
                output = unit(x)
                terms = unit.losses(x, output, labels)
                adams[block].param_groups[0]["lr"] = lr
                adams[block].zero_grad()
                torch.autograd.backward(torch.stack(list(terms.values())).sum())
                adams[block].step()
                result.losses[step, block] = {name: term.item() for name, term in terms.items()}
                x = output.detach()
            step += 1
        result.accuracy.append(evaluate(config, source, result.units))
    return result


@torch.no_grad()
def evaluate(config: Config, source: data.DataSource, units: dict[int, Unit]) -> float:
    """Test accuracy."""
    correct = 0
    for indices in torch.split(torch.arange(source.sizes["test"]), config.data.batch_size):
        x, labels = source.batch("test", 0, indices)
        last: Unit | None = None
        for unit in units.values():
            unit.eval()
            x, last = unit(x), unit
        assert last is not None
        correct += int((last.predict(x).argmax(1) == labels).sum())
    return correct / source.sizes["test"]


def tensors(units: dict[int, Unit]) -> dict[str, Tensor]:
    """Weights under the names of an export."""
    return {
        f"{part}.{block}.{name}": tensor
        for block, unit in units.items()
        for part, module in (("blocks", unit.block), ("heads", unit.heads))
        for name, tensor in module.state_dict().items()
    }
