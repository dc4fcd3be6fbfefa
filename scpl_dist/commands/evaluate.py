"""``scpl-dist evaluate``: accuracy and other metrics of the weights that a run has saved.

Without an option all samples go to the end, and the figures are those of the run itself. With a threshold, the mean
depth is work that is really saved; of a language model it is what ``generate`` saves, as here the tokens after one that
has left still go to the end. Blocks answer by local classifiers (``early_exit``, and ``scpl`` with the objectives ce
and predsim), local predictors (``loss.local_predictors``), and the decoders of ``al``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from scpl_dist.commands import saved
from scpl_dist.commands.answers import Exits, answers, checked, in_portions
from scpl_dist.data.source import Split
from scpl_dist.methods.task import IGNORED, plain
from scpl_dist.run.scores import Sum, add, values


@dataclass
class Evaluation:
    """Counts on a part of the data: by block, the samples that left there, and how many of them had the right class.

    Of a language model, tokens in place of samples.
    """

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


def evaluate(
    run_dir: Path,
    split: str = "test",
    checkpoint: str | None = None,
    threshold: float | None = None,
    block: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    low_memory: bool = False,
) -> Evaluation:
    """What `scpl_dist.evaluate` does; `ValueError` also if no block but the last one can answer."""
    run = saved.find(run_dir, checkpoint, device, with_data=True)
    plan, source = run.plan, run.source
    assert source is not None
    method, last = plan.method, len(plan.parameters) - 1
    size = source.sizes.get(split)
    if not size:
        raise ValueError(f"--split {split!r}: the data set has {', '.join(source.sizes)}")
    if block is not None and not 0 <= block <= last:
        raise ValueError(f"--block {block}: the model has the blocks 0 to {last}")
    option = f"--exit-threshold {threshold}" if block is None else f"--block {block}"
    exits = Exits(
        plan, None if block is None else block + 1, None if block is not None else threshold, option
    )
    blocks = run.blocks(low_memory, exits.depth)
    found = Evaluation([0] * (last + 1), [0] * (last + 1), {}, blocks.checkpoint.name)
    sums: list[dict[str, Sum]] = []
    parts = torch.split(torch.arange(size), checked(batch_size, plan.config.data.batch_size))
    for some in in_portions(parts, low_memory):
        batches = [source.batch(cast(Split, split), 0, part) for part in some]
        wanted = [labels.clone() for _, labels in batches]
        for answer in answers(plan, blocks, [inputs for inputs, _ in batches], exits, run.device):
            labels = wanted[answer.batch][answer.rows]
            if answer.tokens is not None:
                wanted[answer.batch][answer.rows] = labels.masked_fill(answer.tokens, IGNORED)
                labels = labels.masked_fill(~answer.tokens, IGNORED)
                if method.task.counted(labels) == 0:
                    continue
            labels = labels.to(run.device)
            sums.append(plain(method.metrics(answer.scores, labels)))
            correct, left = sums[-1]["accuracy"]
            found.left[answer.block] += int(left)
            found.correct[answer.block] += int(cast(int, correct))
    found.metrics = values(add(sums), source.classes, plan.config.task.metrics)
    return found
