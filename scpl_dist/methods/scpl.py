"""Supervised Contrastive Parallel Learning (arXiv 2602.00062): a contrastive loss for every block.

The last block has a predictor too. It learns by cross-entropy on the *detached* feature: no block ever sees the
gradient of the cross-entropy. The contrastive loss may be exchanged for another local objective, ``loss.name``.

With a local classifier as objective this is *early exit*, what the papers on SCPL compare with (also known as DGL, or
"pred" of arXiv 1901.06656). It is not BranchyNet, which sums the losses of all exits and sends their gradients through
the whole network. Accuracy is that of the final predictor; leaving early is a choice at inference,
``evaluate --exit-threshold``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scpl_dist.methods import objectives
from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.methods.heads import feature
from scpl_dist.methods.objectives import Objective
from scpl_dist.methods.task import Task
from scpl_dist.run.config import Config


class LocalUnit(TrainableBlock):
    """A block with a local objective and perhaps a predictor, which learns beside it and does not change it."""

    def __init__(self, block: nn.Module, objective: Objective, task: Task) -> None:
        super().__init__(block, objective.heads)
        self.objective = objective
        self.task = task

    def embed(self, before: Carry, after: Carry) -> dict[str, Tensor]:
        features = feature(self.block, after)
        seen = {name: head(features) for name, head in self.heads.items() if name != "predictor"}
        if "predictor" in self.heads:
            seen["predictor"] = self.heads["predictor"](features.detach())
        return seen

    def loss_terms(self, seen: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        terms = self.objective.loss_terms(seen, labels)
        if "predictor" in seen:
            terms["classifier"] = self.task.loss(seen["predictor"], labels)
        return terms

    def local_scores(self, after: Carry) -> Tensor | None:
        """Scores of the predictor, or else of the objective's classifier, if there is one of them."""
        for name in ("predictor", "classifier"):
            if name in self.heads:
                scores: Tensor = self.heads[name](feature(self.block, after))
                return scores
        return None


class Scpl(LocalMethod):
    name = "scpl"
    reads: ClassVar[tuple[str, ...]] = ("loss.", "task.compared")

    def __init__(self, config: Config, num_blocks: int, task: Task) -> None:
        super().__init__(config, num_blocks, task)
        self._twice_forward = self.compares and config.pipeline.micro_batches > 1
        if self._twice_forward and config.runtime.compile:
            raise ValueError(
                f"runtime.compile = {config.runtime.compiled} and pipeline.micro_batches = "
                f"{config.pipeline.micro_batches}: {self.name} computes each part a second time, and what is compiled "
                "cannot be computed again by the same code; use one of them"
            )

    @property
    def compares(self) -> bool:
        return self.config.loss.name != "ce"

    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        """The objective's heads for each block, a predictor for the last, and for all if they are wanted.

        ValueError for BatchNorm in a batch that is split: the loss would not be that of the whole batch.
        """
        made = self._unit(index, block, after)
        if self._twice_forward and index not in self.config.frozen(0):
            for name, module in made.named_modules():
                if isinstance(module, _BatchNorm):
                    raise ValueError(
                        f"pipeline.micro_batches = {self.config.pipeline.micro_batches}: {name} of block {index} is a "
                        f"{type(module).__name__}, which normalises each part by the part's own statistics, so the "
                        "loss would not be that of the whole batch; use pipeline.micro_batches = 1, or GroupNorm or "
                        "LayerNorm in its place"
                    )
        return made

    def _unit(self, index: int, block: nn.Module, after: Any) -> LocalUnit:
        settings = self.config.loss
        objective = objectives.make(settings, block, after, self.task)
        if index == self.num_blocks - 1:
            objective.heads["predictor"] = self.task.head(block, after)
        elif settings.local_predictors:
            objective.heads["predictor"] = objectives.classifier(settings, block, after, self.task)
        return LocalUnit(block, objective, self.task)


class EarlyExit(Scpl):
    """SCPL with ``loss.name = "ce"``, whatever the configuration says there."""

    name = "early_exit"
    reads = ("loss.classifier", "loss.local_predictors")

    def __init__(self, config: Config, num_blocks: int, task: Task) -> None:
        loss = config.loss.model_copy(update={"name": "ce"})
        super().__init__(config.model_copy(update={"loss": loss}), num_blocks, task)
