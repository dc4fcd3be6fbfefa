"""Leaving early at inference: a sample stops at the first block that is sure enough of its answer.

Works for every method whose blocks can answer: local classifiers (``early_exit``, and ``scpl`` with the objectives ce
and predsim), local predictors (``loss.local_predictors``), and the decoders of ``al``. The blocks behind an exit never
see the samples that have left, so the mean depth is work that is really saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.commands.evaluate import load
from scpl_dist.data.source import Split
from scpl_dist.methods import Method
from scpl_dist.methods.block import Carry, TrainableBlock


@dataclass(frozen=True)
class Exits:
    """What early exit did on a part of the data.

    Attributes:
        total: samples.
        left: by block, samples that left behind it.
        correct: by block, how many of them had the right class.
    """

    total: int
    left: list[int]
    correct: list[int]

    @property
    def accuracy(self) -> float:
        """Share of right classes, wherever the samples left."""
        return sum(self.correct) / self.total

    @property
    def mean_depth(self) -> float:
        """Blocks that a sample passed on average."""
        return sum((block + 1) * count for block, count in enumerate(self.left)) / self.total

    def table(self) -> str:
        """A row a block: share of the samples that left there, and their accuracy."""
        rows = ["block   left  accuracy"]
        for block, (count, correct) in enumerate(zip(self.left, self.correct, strict=True)):
            accuracy = f"{correct / count:9.4f}" if count else "        -"
            rows.append(f"{block:5} {count / self.total:6.1%} {accuracy}")
        return "\n".join(rows)


@torch.no_grad()
def evaluate(
    run_dir: Path,
    split: str = "test",
    checkpoint: str | None = None,
    *,
    threshold: float | None = None,
    block: int | None = None,
) -> Exits:
    """Accuracy with early exit.

    Args:
        run_dir: run folder.
        split: part of the data.
        checkpoint: see `scpl_dist.commands.evaluate.load`.
        threshold: smallest probability of the likeliest class to leave with, above 0.
        block: instead, let all samples leave behind this block.

    Raises:
        ValueError: a threshold or block that means nothing, or no block but the last can answer.
    """
    plan, source, trainables = load(run_dir, checkpoint)
    if split not in source.sizes or not source.sizes[split]:
        raise ValueError(f"--split {split!r}: the data set has {', '.join(source.sizes)}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"--exit-threshold {threshold}: give the probability to leave with, such as 0.9")
    if block is not None and not 0 <= block < len(trainables):
        raise ValueError(f"--block {block}: the model has the blocks 0 to {len(trainables) - 1}")
    left, correct = [0] * len(trainables), [0] * len(trainables)
    indices = torch.arange(source.sizes[split])
    for part in torch.split(indices, plan.config.data.batch_size):
        inputs, labels = source.batch(cast(Split, split), 0, part)
        carry = plan.method.carry(inputs, labels)
        _pass(plan.method, trainables, carry, labels, threshold, block, left, correct)
    return Exits(sum(left), left, correct)


def _pass(
    method: Method,
    trainables: dict[int, TrainableBlock],
    carry: Carry,
    labels: Tensor,
    threshold: float | None,
    only: int | None,
    left: list[int],
    correct: list[int],
) -> None:
    """One batch; counts go into `left` and `correct`."""
    able = False
    for index, trainable in trainables.items():
        carry = trainable(carry)
        if only is not None and index < only:
            continue
        last = index == len(trainables) - 1
        probabilities = method.probabilities(trainables, index, carry)
        if probabilities is None:
            if only == index:
                raise _unable(method, f"--block {only}")
            continue
        if last and only is None and not able and len(left) > 1:
            raise _unable(method, f"--exit-threshold {threshold}")
        able = True
        sure, answer = probabilities.max(1)
        leaving = (
            torch.ones_like(sure, dtype=torch.bool) if last or only == index else sure >= (threshold or 0)
        )
        left[index] += int(leaving.sum())
        correct[index] += int((answer == labels)[leaving].sum())
        if leaving.all():
            return
        carry = _keep(carry, ~leaving)
        labels = labels[~leaving]


def _keep(carry: Carry, rows: Tensor) -> Carry:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[rows], carry)


def _unable(method: Method, option: str) -> ValueError:
    return ValueError(
        f"{option}: no block before the last one can answer with run.method = {method.name!r} and loss.name = "
        f"{method.config.loss.name!r}; train with loss.local_predictors = true, or use early_exit or al"
    )
