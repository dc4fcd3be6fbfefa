"""Local objectives by name: the heads that a block gets, and the terms that are minimised on its feature.

supcon      projector; supervised contrastive loss (SCPL)
ce          local classifier; cross-entropy (early exit, "pred")
predsim     3x3 convolution and linear classifier; 0.99 similarity matching + 0.01 cross-entropy
deinforeg   projector; covariance, invariance and variance
your own    projector; ``package.module:function``, ``file.py:function`` or the name of an entry point in the group
            ``scpl_dist.methods.losses``: ``function(features (N, D), labels (N,), **loss.args)`` returns a scalar
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import losses
from scpl_dist.methods.heads import Predictor, Projector, feature
from scpl_dist.run import config
from scpl_dist.run.imports import load_object

ENTRY_POINTS = "scpl_dist.methods.losses"
SIMILARITY_SHARE = 0.99
"""Weight of similarity matching in "predsim"; the cross-entropy has the rest."""

Heads = nn.ModuleDict


@dataclass(frozen=True)
class Objective:
    """What a block learns from.

    Attributes:
        heads: modules that train with the block.
        embed: (heads, feature (N, ...)) to a pytree of tensors (N, ...), sample by sample.
        loss_terms: (what is seen of all samples, labels (N,)) to scalars by name; their sum is minimised.
    """

    heads: Mapping[str, nn.Module]
    embed: Callable[[Heads, Tensor], Any]
    loss_terms: Callable[[Any, Tensor], dict[str, Tensor]]


def make(name: str, settings: config.Loss, block: nn.Module, output: Any, classes: int) -> Objective:
    """The objective of one block.

    Args:
        name: see the module; ``loss.name``.
        settings: section ``loss``.
        block: the block.
        output: what it returns, a pytree of meta tensors.
        classes: number of classes.

    Raises:
        ValueError: unknown name, or settings that do not fit.
    """
    if name == "ce":
        return Objective(
            {"classifier": classifier(settings, block, output, classes)}, _scores, _cross_entropy
        )
    if name == "predsim":
        heads = {
            "similarity": _similarity(feature(block, output)),
            "classifier": Predictor(block, output, classes, "l"),
        }
        return Objective(heads, _both, partial(_predsim, classes=classes))
    terms: Callable[[Any, Tensor], dict[str, Tensor]]
    if name == "supcon":
        terms = partial(_contrastive, temperature=settings.temperature, divisor=settings.divisor)
    elif name == "deinforeg":
        terms = partial(losses.deinforeg, classes=classes)
    else:
        terms = partial(_own, name=name, function=_find(name, settings.args))
    return Objective({"projector": Projector(settings.projector, block, output)}, _projected, terms)


def classifier(settings: config.Loss, block: nn.Module, output: Any, classes: int) -> Predictor:
    """A local classifier, ``loss.classifier``; "m" is the block's own preference or two layers of width 512."""
    kind = getattr(block, "classifier", "sigmoid,512") if settings.classifier == "m" else settings.classifier
    try:
        return Predictor(block, output, classes, kind)
    except ValueError as error:
        raise ValueError(f'loss.classifier = {settings.classifier!r}: "m", or {error}') from None


def _projected(heads: Heads, features: Tensor) -> Tensor:
    projected: Tensor = heads["projector"](features)
    return projected


def _scores(heads: Heads, features: Tensor) -> Tensor:
    scores: Tensor = heads["classifier"](features)
    return scores


def _both(heads: Heads, features: Tensor) -> tuple[Tensor, Tensor]:
    return heads["similarity"](features), heads["classifier"](features)


def _contrastive(projected: Tensor, labels: Tensor, temperature: float, divisor: str) -> dict[str, Tensor]:
    return {"contrastive": losses.supcon(projected, labels, temperature, divisor)}


def _cross_entropy(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"local": functional.cross_entropy(scores, labels)}


def _predsim(seen: tuple[Tensor, Tensor], labels: Tensor, classes: int) -> dict[str, Tensor]:
    similar = losses.similarity_matching(seen[0], labels, classes)
    local = functional.cross_entropy(seen[1], labels)
    return {"similarity": SIMILARITY_SHARE * similar, "local": (1 - SIMILARITY_SHARE) * local}


def _similarity(seen: Tensor) -> nn.Module:
    if seen.dim() == 4:
        return nn.Conv2d(seen.shape[1], seen.shape[1], 3, padding=1, bias=False)
    width = seen.shape[1:].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(width, width, bias=False))


def _own(
    projected: Tensor, labels: Tensor, name: str, function: Callable[[Tensor, Tensor], Any]
) -> dict[str, Tensor]:
    value = function(projected, labels)
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"loss.name = {name!r}: returned {shape}, return a tensor without dimensions")
    return {"local": value}


def _find(name: str, args: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Any]:
    if ":" in name:
        function = load_object(name, "loss.name")
    else:
        found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name not in found:
            own = f", {', '.join(found)}" if found else ""
            raise ValueError(
                f"loss.name = {name!r}: unknown; use supcon, ce, predsim, deinforeg{own}, or a function of your own as "
                "package.module:function or path/to/file.py:function"
            )
        function = found[name].load()
    try:
        inspect.signature(function).bind(None, None, **args)
    except TypeError as error:
        raise ValueError(
            f"loss.args = {dict(args)!r}: {name} cannot be called with (features, labels) and them: {error}"
        ) from None
    return partial(function, **args)
