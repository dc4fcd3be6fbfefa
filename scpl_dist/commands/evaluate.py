"""``scpl-dist evaluate``: accuracy and other metrics of the weights that a run has saved.

    samples --> block 0 --> block 1 --> ... --> last block --> answer
                   '-- sure enough? --> answer, and the blocks behind never see the sample

Without an option all samples go to the end, and the figures are those of the run itself. With a threshold, the mean
depth is work that is really saved. Blocks answer by local classifiers (``early_exit``, and ``scpl`` with the objectives
ce and predsim), local predictors (``loss.local_predictors``), and the decoders of ``al``.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.commands.saved import load
from scpl_dist.data.source import Split
from scpl_dist.methods import arithmetic
from scpl_dist.methods.task import plain
from scpl_dist.run.scores import Sum, add, values
from scpl_dist.storage.checkpoints import find


@dataclass
class Evaluation:
    """Counts on a part of the data: by block, the samples that left there, and how many of them had the right class."""

    left: list[int]
    correct: list[int]
    metrics: dict[str, Any]  # see `scpl_dist.run.scores.values`
    checkpoint: str  # name of that whose weights have answered

    @property
    def total(self) -> int:
        return sum(self.left)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.total

    @property
    def mean_depth(self) -> float:
        return sum((block + 1) * count for block, count in enumerate(self.left)) / self.total

    def rows(self) -> list[list[str]]:
        return [
            [str(block), f"{left / self.total:.1%}", f"{correct / left:.4f}" if left else "-"]
            for block, (left, correct) in enumerate(zip(self.left, self.correct, strict=True))
        ]


@torch.no_grad()
def evaluate(
    run_dir: Path,
    split: str = "test",
    checkpoint: str | None = None,
    threshold: float | None = None,
    block: int | None = None,
) -> Evaluation:
    """What `scpl_dist.evaluate` does; `ValueError` also if no block but the last one can answer."""
    plan, source, trainables = load(run_dir, checkpoint)
    method, last = plan.method, len(trainables) - 1
    if not source.sizes.get(split):
        raise ValueError(f"--split {split!r}: the data set has {', '.join(source.sizes)}")
    if threshold is not None and not 0 < threshold <= 1:
        fix = "give the probability to leave with, above 0 and at most 1, such as 0.9"
        raise ValueError(f"--exit-threshold {threshold}: {fix}")
    if block is not None and not 0 <= block <= last:
        raise ValueError(f"--block {block}: the model has the blocks 0 to {last}")
    exits = list(trainables)
    if block is not None or threshold is None:
        exits = [last if block is None else block]
    arithmetic.settle(plan.config)
    # As in the run, but on the CPU of a machine that has no GPU.
    device = torch.device("cuda" if arithmetic.on_gpu(plan.config) else "cpu")
    for trainable in trainables.values():
        trainable.to(device)
    name = find(run_dir, checkpoint).name
    found = Evaluation([0] * len(trainables), [0] * len(trainables), {}, name)
    sums: list[dict[str, Sum]] = []
    for part in torch.split(torch.arange(source.sizes[split]), plan.config.data.batch_size):
        batch = source.batch(cast(Split, split), 0, part)
        inputs, labels = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), batch)
        carry = method.carry(inputs, labels)
        answering = []
        for index, trainable in trainables.items():
            carry = trainable(carry)
            scores = method.scores(trainables, index, carry) if index in exits else None
            if scores is None:
                continue
            answering.append(index)
            leaving = torch.ones_like(labels, dtype=torch.bool)
            if threshold is not None and index != exits[-1]:
                leaving = method.probabilities(scores).amax(1) >= threshold
            if leaving.any():
                sums.append(plain(method.metrics(scores[leaving], labels[leaving])))
                correct, left = sums[-1]["accuracy"]
                found.left[index] += int(left)
                found.correct[index] += int(cast(int, correct))
            if leaving.all():
                break
            carry, labels = pytree.tree_map_only(Tensor, itemgetter(~leaving), (carry, labels))
        if exits != [last] and answering in ([], [last]):
            option = f"--exit-threshold {threshold}" if block is None else f"--block {block}"
            raise ValueError(
                f"{option}: no block before the last one can answer with run.method = {method.name!r} and loss.name "
                f"= {plan.config.loss.name!r}; train with loss.local_predictors = true, or use early_exit or al"
            )
    found.metrics = values(add(sums), source.classes, plan.config.task.metrics)
    return found
