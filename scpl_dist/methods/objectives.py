"""Local objectives by name: the heads that a block gets, and the terms that are minimised on its feature.

supcon      projector; supervised contrastive loss (SCPL)
ce          local classifier; the task's loss (early exit, "pred")
predsim     3x3 convolution and linear classifier; 0.99 similarity matching + 0.01 of the task's loss
deinforeg   projector; covariance, invariance and variance
your own    projector; ``package.module:function``, ``file.py:function`` or the name of an entry point in the group
            ``scpl_dist.methods.losses``: ``function(features (N, D), labels (N,), **loss.args)`` returns a scalar
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from scpl_dist.methods import losses
from scpl_dist.methods.heads import Projector, feature
from scpl_dist.methods.task import IGNORED, Task, labelled
from scpl_dist.run.config import Loss
from scpl_dist.run.imports import bind
from scpl_dist.run.registry import Registry

LOSSES = Registry(
    "methods.losses",
    "loss.name",
    {name: f"scpl_dist.methods.objectives:{name}" for name in ("supcon", "ce", "predsim", "deinforeg")},
)
SIMILARITY_SHARE = 0.99  # weight of similarity matching in "predsim"; the task's loss has the rest

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What a block learns from: heads on its feature, by name, and the loss of what they make of it."""

    heads: dict[str, nn.Module]
    # (What each head gives of all samples, their labels) to scalars by name; their sum is minimised.
    loss_terms: Callable[[Mapping[str, Tensor], Tensor], Terms]


def make(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    """The objective ``loss.name`` of one block, of whose output only shapes are read."""
    found = LOSSES.find(settings.name)
    if settings.name in LOSSES.builtin:
        objective: Objective = found(settings, block, output, task)
        return objective
    function = bind(found, "loss.args", settings.args, None, None, name=settings.name)

    def own(projected: Tensor, labels: Tensor) -> Terms:
        value = function(projected, labels)
        if isinstance(value, Tensor) and value.dim() == 0:
            return {"local": value}
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss.name = {settings.name!r}: returned {shape}, return a tensor without dimensions"
        )

    return _projected(settings, block, output, task, own)


def _projected(
    settings: Loss, block: nn.Module, output: Any, task: Task, terms: Callable[[Tensor, Tensor], Terms]
) -> Objective:
    """Of terms that take only rows with a class."""

    def given(projected: Tensor, classes: Tensor) -> Terms:
        return terms(*labelled(projected, classes)) if task.per_token else terms(projected, classes)

    return _compared(settings, block, output, task, given)


def _compared(
    settings: Loss, block: nn.Module, output: Any, task: Task, terms: Callable[[Tensor, Tensor], Terms]
) -> Objective:
    projector = Projector(settings.projector, block, output, task.per_token)
    return Objective(
        {"projector": projector}, lambda seen, labels: terms(*task.compared(seen["projector"], labels))
    )


def supcon(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    ignored = IGNORED if task.per_token else None

    def terms(projected: Tensor, classes: Tensor) -> Terms:
        return {
            "contrastive": losses.supcon(projected, classes, settings.temperature, settings.divisor, ignored)
        }

    return _compared(settings, block, output, task, terms)


def deinforeg(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    return _projected(settings, block, output, task, partial(losses.deinforeg, classes=task.classes))


def classifier(settings: Loss, block: nn.Module, output: Any, task: Task) -> nn.Module:
    """A local classifier, ``loss.classifier``; "m" is the block's own preference or that of the task."""
    kind = (
        getattr(block, "classifier", task.classifier) if settings.classifier == "m" else settings.classifier
    )
    try:
        return task.head(block, output, kind)
    except ValueError as error:
        raise ValueError(f'loss.classifier = {settings.classifier!r}: "m", or {error}') from None


def ce(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    return Objective(
        {"classifier": classifier(settings, block, output, task)},
        lambda seen, labels: {"local": task.loss(seen["classifier"], labels)},
    )


def predsim(settings: Loss, block: nn.Module, output: Any, task: Task) -> Objective:
    if task.per_token:
        raise ValueError(
            'loss.name = "predsim" and task.name = "lm": it compares whole samples, and a text has no class; use '
            '"ce" or "supcon"'
        )

    def terms(seen: Mapping[str, Tensor], labels: Tensor) -> Terms:
        similar = losses.similarity_matching(seen["similarity"], labels, task.classes)
        local = task.loss(seen["classifier"], labels)
        return {"similarity": SIMILARITY_SHARE * similar, "local": (1 - SIMILARITY_SHARE) * local}

    _, *shape = feature(block, output).shape
    width = math.prod(shape)
    similarity: nn.Module = (
        nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
        if len(shape) == 3
        else nn.Sequential(nn.Flatten(), nn.Linear(width, width, bias=False))
    )
    return Objective({"similarity": similarity, "classifier": task.head(block, output, "l")}, terms)
