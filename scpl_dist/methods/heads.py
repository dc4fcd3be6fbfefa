"""Auxiliary heads: the projector of a local loss and the predictor on the last block.

Heads are no part of the blocks: the projector is dropped after training, and the predictor belongs to the
last block only. A block may say how its output is read, with plain attributes, all optional:

- ``feature(output) -> Tensor (B, ...)``: what the heads see; must work on tensors without storage ("meta").
  Default: the first tensor of the output.
- ``projector_widths = (HIDDEN, OUT)``: default widths of its projector. Default: (512, 1024).
- ``classifier``: kind of its local classifier (see `Predictor`), where one is trained. Default: "sigmoid,512".
- ``predictor``: kind of its predictor (see `Predictor`), or a function ``(classes) -> nn.Module``.
  Default: "l".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
_PROJECTOR_FIX = (
    'write "i", "l", "m" or "mb", then optionally ",avg" and ",HIDDEN,OUT", such as "m,avg,512,1024"'
)
_PREDICTOR_FIX = 'write "l", or an activation and a width such as "sigmoid,2500" (relu, sigmoid, tanh)'


def feature(block: nn.Module, output: Any) -> torch.Tensor:
    """The tensor (B, ...) that the heads of `block` read from its output; they flatten it from dimension 1."""
    method = getattr(block, "feature", None)
    if method is not None:
        result: torch.Tensor = method(output)
        return result
    first: torch.Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return first


class _Head(nn.Module):
    layers: nn.Module

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(feature)
        return output


class Projector(_Head):
    """Maps a block's feature (B, ...) to the space of the contrastive loss (B, OUT).

    Kinds: "i" flattens; "l" Linear to OUT; "m" Linear to HIDDEN, ReLU, Linear to OUT; "mb" the same with
    BatchNorm before the ReLU. ",avg" halves height and width by adaptive average pooling first (images only).
    ",HIDDEN,OUT" sets the widths; for "l" HIDDEN is not used.

    Raises:
        ValueError: `kind` is none of these, or ",avg" meets a feature without height and width.
    """

    layers: nn.Sequential

    def __init__(self, kind: str, block: nn.Module, output: Any) -> None:
        super().__init__()
        name, pooled, widths = _parse_projector(kind)
        preferred: tuple[int, int] = getattr(block, "projector_widths", (512, 1024))
        hidden, out = widths or preferred
        shape = list(feature(block, output).shape[1:])
        layers: list[nn.Module] = []
        if pooled:
            if len(shape) != 3:
                raise ValueError(
                    f'loss.projector = {kind!r}: ",avg" needs a (batch, channels, height, width) output, '
                    f'{type(block).__name__} gives {("batch", *shape)}; leave ",avg" out'
                )
            shape[1:] = [max(1, side // 2) for side in shape[1:]]
            layers.append(nn.AdaptiveAvgPool2d((shape[1], shape[2])))
        layers.append(nn.Flatten())
        width = math.prod(shape)
        if name == "l":
            layers.append(nn.Linear(width, out))
        elif name in ("m", "mb"):
            norm = [nn.BatchNorm1d(hidden)] if name == "mb" else []
            layers += [nn.Linear(width, hidden), *norm, nn.ReLU(), nn.Linear(hidden, out)]
        self.layers = nn.Sequential(*layers)


class Predictor(_Head):
    """Class scores from a block's feature: "l" is Linear, "sigmoid,2500" Linear-Sigmoid-Linear.

    No kind takes the block's ``predictor`` preference.

    Raises:
        ValueError: `kind` is not of this form.
    """

    def __init__(self, block: nn.Module, output: Any, classes: int, kind: str | None = None) -> None:
        super().__init__()
        chosen = getattr(block, "predictor", "l") if kind is None else kind
        if not isinstance(chosen, str):
            self.layers = chosen(classes)
            return
        width = math.prod(feature(block, output).shape[1:])
        if chosen == "l":
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(width, classes))
            return
        name, _, digits = chosen.partition(",")
        if name not in _ACTIVATIONS or not digits.isdecimal() or int(digits) == 0:
            raise ValueError(f"predictor {chosen!r}: {_PREDICTOR_FIX}")
        hidden = int(digits)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(width, hidden), _ACTIVATIONS[name](), nn.Linear(hidden, classes)
        )


def _parse_projector(kind: str) -> tuple[str, bool, tuple[int, int] | None]:
    name, *rest = kind.split(",")
    pooled = rest[:1] == ["avg"]
    sizes = rest[1:] if pooled else rest
    readable = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if name not in ("i", "l", "m", "mb") or len(sizes) not in (0, 2) or not readable:
        raise ValueError(f"loss.projector = {kind!r}: {_PROJECTOR_FIX}")
    return name, pooled, (int(sizes[0]), int(sizes[1])) if sizes else None
