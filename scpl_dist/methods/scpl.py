"""Supervised Contrastive Parallel Learning (arXiv 2602.00062): a contrastive loss for every block.

The last block has a predictor too. It learns by cross-entropy on the *detached* feature: no block ever sees the
gradient of the cross-entropy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from scpl_dist import losses
from scpl_dist.heads import Predictor, Projector, feature
from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.unit import Carry, Unit, detached

__all__ = ["Scpl"]


class ContrastiveUnit(Unit):
    """A block with a projector and, if it is the last, a predictor."""

    def __init__(
        self, block: nn.Module, heads: dict[str, nn.Module], temperature: float, divisor: str
    ) -> None:
        super().__init__(block, heads)
        self.temperature = temperature
        self.divisor = divisor

    def losses(self, before: Carry, after: Carry, labels: Tensor) -> dict[str, Tensor]:
        """``contrastive``, and ``classifier`` where there is a predictor."""
        projected = self.heads["projector"](feature(self.block, after))
        terms = {"contrastive": losses.supcon(projected, labels, self.temperature, self.divisor)}
        if "predictor" in self.heads:
            terms["classifier"] = functional.cross_entropy(self.predict(detached(after)), labels)
        return terms

    def predict(self, after: Carry) -> Tensor:
        """Class scores (N, classes) of the predictor."""
        scores: Tensor = self.heads["predictor"](feature(self.block, after))
        return scores


class Scpl(LocalMethod):
    """SCPL: see the module."""

    name = "scpl"
    whole = "a contrastive loss compares all samples of a batch, so parts of it have another loss"

    def unit(self, index: int, block: nn.Module, before: Any, after: Any) -> Unit:
        """A projector for each block, a predictor for the last."""
        parts: dict[str, nn.Module] = {"projector": Projector(self.config.loss.projector, block, after)}
        if index == self.num_blocks - 1:
            parts["predictor"] = Predictor(block, after, self.classes)
        return ContrastiveUnit(block, parts, self.config.loss.temperature, self.config.loss.divisor)
