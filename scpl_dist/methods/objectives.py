"""Local objectives by name: the heads that a block gets, and the terms that are minimised on its feature.

supcon      projector; supervised contrastive loss (SCPL)
ce          local classifier; the task's loss (early exit, "pred")
predsim     3x3 convolution and linear classifier; 0.99 similarity matching + 0.01 of the task's loss
deinforeg   projector; covariance, invariance and variance
your own    projector; ``package.module:function``, ``file.py:function`` or the name of an entry point in the group
            ``scpl_dist.methods.losses``: ``function(features (N, D), labels (N,), **loss.args)`` returns a scalar
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scpl_dist.methods import losses
from scpl_dist.methods.heads import Projector, feature
from scpl_dist.methods.task import Task
from scpl_dist.run.config import Loss
from scpl_dist.run.imports import bind
from scpl_dist.run.registry import Registry

LOSSES = Registry(
    "methods.losses",
    "loss.name",
    {
        "supcon": "scpl_dist.methods.objectives:supcon",
        "ce": "scpl_dist.methods.objectives:ce",
        "predsim": "scpl_dist.methods.objectives:predsim",
        "deinforeg": "scpl_dist.methods.objectives:deinforeg",
    },
)
SIMILARITY_SHARE = 0.99
"""Weight of similarity matching in "predsim"; the task's loss has the rest."""

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What a block learns from.

    Attributes:
        heads: modules that train with the block.
        embed: (heads, feature (N, ...)) to a pytree of tensors (N, ...), sample by sample.
        loss_terms: (what is seen of all samples, labels (N,)) to scalars by name; their sum is minimised.
    """

    heads: Mapping[str, nn.Module]
    embed: Callable[[nn.ModuleDict, Tensor], Any]
    loss_terms: Callable[[Any, Tensor], Terms]


def make(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    """The objective ``loss.name`` of one block.

    Args:
        settings: section ``loss``.
        block: the block.
        output: what it returns, a pytree of meta tensors.
        task: what the model is trained for.

    Raises:
        ValueError: unknown name, or settings that do not fit.
    """
    found = LOSSES.find(settings.name)
    if settings.name in LOSSES.builtin:
        objective: Objective = found(settings, block, output, task)
        return objective
    function = bind(found, "loss.args", settings.args, None, None, name=settings.name)
    return _projected(settings, block, output, partial(_own, settings.name, function))


def whole(name: str) -> str:
    """Why an objective needs whole batches; empty if its loss is a mean over samples."""
    return (
        ""
        if name == "ce"
        else "a contrastive loss compares all samples of a batch, so parts of it have another loss"
    )


def classifier(settings: Loss, block: nn.Module, output: Any, task: Task) -> nn.Module:
    """A local classifier, ``loss.classifier``; "m" is the block's own preference or two layers of width 512."""
    kind = getattr(block, "classifier", "sigmoid,512") if settings.classifier == "m" else settings.classifier
    try:
        return task.head(block, output, kind)
    except ValueError as error:
        raise ValueError(f'loss.classifier = {settings.classifier!r}: "m", or {error}') from None


def supcon(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    def terms(projected: Tensor, labels: Tensor) -> Terms:
        return {"contrastive": losses.supcon(projected, labels, settings.temperature, settings.divisor)}

    return _projected(settings, block, output, terms)


def ce(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    return Objective(
        {"classifier": classifier(settings, block, output, task)},
        lambda heads, features: heads["classifier"](features),
        lambda scores, labels: {"local": task.loss(scores, labels)},
    )


def predsim(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    def terms(seen: tuple[Tensor, Tensor], labels: Tensor) -> Terms:
        similar = losses.similarity_matching(seen[0], labels, task.classes)
        local = task.loss(seen[1], labels)
        return {"similarity": SIMILARITY_SHARE * similar, "local": (1 - SIMILARITY_SHARE) * local}

    shape = feature(block, output).shape
    similarity: nn.Module = (
        nn.Conv2d(shape[1], shape[1], 3, padding=1, bias=False)
        if len(shape) == 4
        else nn.Sequential(nn.Flatten(), nn.Linear(shape[1:].numel(), shape[1:].numel(), bias=False))
    )
    return Objective(
        {"similarity": similarity, "classifier": task.head(block, output, "l")},
        lambda heads, features: (heads["similarity"](features), heads["classifier"](features)),
        terms,
    )


def deinforeg(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    return _projected(settings, block, output, partial(losses.deinforeg, classes=task.classes))


def _projected(
    settings: Loss, block: nn.Module, output: Any, terms: Callable[[Tensor, Tensor], Terms]
) -> Objective:
    """An objective that sees the feature through a projector."""
    heads = {"projector": Projector(settings.projector, block, output)}
    return Objective(heads, lambda heads, features: heads["projector"](features), terms)


def _own(name: str, function: Callable[..., Any], projected: Tensor, labels: Tensor) -> Terms:
    value = function(projected, labels)
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"loss.name = {name!r}: returned {shape}, return a tensor without dimensions")
    return {"local": value}
