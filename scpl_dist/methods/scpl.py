"""Supervised Contrastive Parallel Learning (arXiv 2602.00062): a contrastive loss for every block.

The last block has a predictor too. It learns by cross-entropy on the *detached* feature: no block ever sees the
gradient of the cross-entropy. The contrastive loss may be exchanged for another local objective, ``loss.name``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import objectives
from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.methods.heads import Predictor, feature
from scpl_dist.methods.objectives import Objective


class LocalUnit(TrainableBlock):
    """A block with a local objective and perhaps a predictor, which learns beside it and does not change it."""

    def __init__(self, block: nn.Module, objective: Objective, predictor: Predictor | None) -> None:
        super().__init__(
            block, {**objective.heads, **({"predictor": predictor} if predictor is not None else {})}
        )
        self.objective = objective

    def embed(self, before: Carry, after: Carry) -> dict[str, Any]:
        """What the objective sees, and the class scores where there is a predictor."""
        features = feature(self.block, after)
        seen = {"objective": self.objective.embed(self.heads, features)}
        if "predictor" in self.heads:
            seen["scores"] = self.heads["predictor"](features.detach())
        return seen

    def loss_terms(self, seen: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
        """The terms of the objective, and ``classifier`` where there is a predictor."""
        terms = self.objective.loss_terms(seen["objective"], labels)
        if "scores" in seen:
            terms["classifier"] = functional.cross_entropy(seen["scores"], labels)
        return terms

    def predict(self, after: Carry) -> Tensor:
        """Class scores (N, classes) of the predictor."""
        scores: Tensor = self.heads["predictor"](feature(self.block, after))
        return scores

    def local_scores(self, after: Carry) -> Tensor | None:
        """Class scores of the predictor, or else of the objective's classifier, if there is one of them."""
        for name in ("predictor", "classifier"):
            if name in self.heads:
                scores: Tensor = self.heads[name](feature(self.block, after))
                return scores
        return None


class Scpl(LocalMethod):
    """SCPL: see the module."""

    name = "scpl"
    whole = "a contrastive loss compares all samples of a batch, so parts of it have another loss"

    @property
    def objective(self) -> str:
        """Name of the local objective."""
        return self.config.loss.name

    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        """The objective's heads for each block, a predictor for the last, and for all if they are wanted."""
        objective = objectives.make(self.objective, self.config.loss, block, after, self.classes)
        predictor: Predictor | None = None
        if index == self.num_blocks - 1:
            predictor = Predictor(block, after, self.classes)
        elif self.config.loss.local_predictors:
            predictor = objectives.classifier(self.config.loss, block, after, self.classes)
        return LocalUnit(block, objective, predictor)
