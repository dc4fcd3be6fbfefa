"""Samples on their way through the blocks of a trained model, until each has its answer.

    samples --> block 0 --> block 1 --> ... --> last block --> answer
                   '-- sure enough? --> answer, and the blocks behind never see the sample

All batches that are given at once pass a block before any passes the next one. With one batch that is the usual way;
with many, a model whose blocks are read one at a time needs memory for one block, and reads it once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.plan.plan import Plan

Item = TypeVar("Item")
AT_ONCE = 32  # batches that pass a block together, where blocks are read one at a time


def checked(batch_size: int | None, usual: int) -> int:
    """Samples in a batch; ValueError for an impossible number."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: give the number of samples in a batch, at least 1")
    return batch_size or usual


def check_threshold(threshold: float | None) -> None:
    """ValueError for what is no probability to leave with."""
    if threshold is not None and not 0 < threshold <= 1:
        fix = "give the probability to leave with, above 0 and at most 1, such as 0.9"
        raise ValueError(f"--exit-threshold {threshold}: {fix}")


def in_portions(batches: Iterable[Item], low_memory: bool) -> Iterator[list[Item]]:
    """The batches that `answers` is given at once."""
    left = iter(batches)
    while portion := list(itertools.islice(left, AT_ONCE if low_memory else 1)):
        yield portion


@dataclass(frozen=True)
class Answers:
    """Of those samples of a batch that leave at a block."""

    batch: int
    block: int
    rows: Tensor  # positions in the batch, (N,) int64, on the CPU
    scores: Tensor  # (N, classes), or (N, length, classes), on the device
    # Where each token has its answer, those that leave here, (N, length) bool: their samples go on, as the tokens after
    # them still see them.
    tokens: Tensor | None = None


class Exits:
    """Where samples may leave; `option` is how the user has asked for it, for messages.

    Without a threshold all leave at the last block of `depth`, by default that of the model.
    """

    def __init__(self, plan: Plan, depth: int | None, threshold: float | None, option: str) -> None:
        blocks = len(plan.parameters)
        check_threshold(threshold)
        if depth is not None and not 1 <= depth <= blocks:
            raise ValueError(
                f"--depth {depth}: the model has {blocks} blocks; give a number from 1 to {blocks}"
            )
        self.depth = depth or blocks
        self.threshold = threshold
        self.early = self.depth < blocks or threshold is not None
        self._plan = plan
        self._option = option

    def unanswered(self) -> ValueError:
        """No block that is asked can answer."""
        config = self._plan.config
        return ValueError(
            f"{self._option}: no block before the last one can answer with run.method = {self._plan.method.name!r} "
            f"and loss.name = {config.loss.name!r}; train with loss.local_predictors = true, or use early_exit or al"
        )


@torch.no_grad()
def answers(
    plan: Plan,
    blocks: Mapping[int, TrainableBlock],
    batches: Sequence[Any],
    exits: Exits,
    device: torch.device,
) -> Iterator[Answers]:
    """Answers for batches of inputs, pytrees of tensors on the CPU; those of a batch come in order of their blocks."""
    method, last = plan.method, exits.depth - 1
    waiting: list[tuple[Tensor, Any]] = []
    for inputs in batches:
        size = len(pytree.tree_leaves(inputs)[0])
        carry = method.carry(inputs, torch.zeros(size, dtype=torch.int64))  # which no answer depends on
        waiting.append((torch.arange(size), carry))
    answering = set()
    for index in range(exits.depth):
        for number, (rows, carry) in enumerate(waiting):
            if not len(rows):
                continue
            carry = blocks[index](_on(carry, device))
            if index == last or exits.threshold is not None:
                scores = method.scores(blocks, index, carry)
                if scores is None and index == last:
                    raise exits.unanswered()
                if scores is not None:
                    answering.add(index)
                    leaving = torch.ones(scores.shape[:-1], dtype=torch.bool)
                    if index != last and exits.threshold is not None:
                        leaving = (method.probabilities(scores).amax(-1) >= exits.threshold).cpu()
                    if method.task.per_token:
                        yield Answers(number, index, rows, scores, leaving)
                    elif leaving.any():
                        there = leaving.to(device)
                        yield Answers(number, index, rows[leaving], scores[there])
                        rows, carry = rows[~leaving], pytree.tree_map_only(Tensor, itemgetter(~there), carry)
            waiting[number] = (rows, carry if len(batches) == 1 else _on(carry, torch.device("cpu")))
    if exits.threshold is not None and last > 0 and answering == {last}:
        raise exits.unanswered()


def _on(carry: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), carry)
