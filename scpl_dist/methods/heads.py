"""Auxiliary heads: the projector of a local loss and the predictor on the last block.

Heads are no part of the blocks: the projector is dropped after training, and the predictor belongs to the
last block only. A block may say how its output is read, with plain attributes, all optional:

A head reads a whole feature, flattened, and gives one answer a sample; or one of each token, `per_token`: then features
are ``(B, length, width)``, answers ``(B, length, ...)``, and no token's answer depends on another's feature.

- ``feature(output) -> Tensor (B, ...)``: what the heads see; must work on tensors without storage ("meta").
  Default: the first tensor of the output.
- ``projector_widths = (HIDDEN, OUT)``: default widths of its projector. Default: (512, 1024).
- ``classifier``: kind of its local classifier (see `Predictor`), where one is trained. Default: "sigmoid,512".
- ``predictor``: kind of its predictor (see `Predictor`), or a function ``(classes) -> nn.Module``.
  Default: "l".
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

NORM = "norm"  # the kind of a head that begins with LayerNorm, which a stream of residuals needs
_PROJECTOR = re.compile(r"(i|l|m|mb)(,avg)?(?:,([1-9]\d*),([1-9]\d*))?")
_PREDICTOR = re.compile(r"(relu|sigmoid|tanh),([1-9]\d*)")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def feature(block: nn.Module, output: Any) -> Tensor:
    """The tensor (B, ...) that the heads of `block` read from its output; they flatten it from dimension 1."""
    read = getattr(block, "feature", None)
    tensors = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    found: Tensor = next(tensors) if read is None else read(output)
    return found


class _Head(nn.Module):
    layers: nn.Module

    def forward(self, feature: Tensor) -> Tensor:
        output: Tensor = self.layers(feature)
        return output


class Projector(_Head):
    """Maps a block's feature (B, ...) to the space of the contrastive loss (B, OUT).

    Kinds: "i" flattens; "l" Linear to OUT; "m" Linear to HIDDEN, ReLU, Linear to OUT; "mb" the same with
    BatchNorm before the ReLU. ",avg" halves height and width by adaptive average pooling first (images only).
    ",HIDDEN,OUT" sets the widths; for "l" HIDDEN is not used. Anything else raises ValueError.
    """

    layers: nn.Sequential

    def __init__(self, kind: str, block: nn.Module, output: Any, per_token: bool = False) -> None:
        super().__init__()
        match = _PROJECTOR.fullmatch(kind)
        if match is None:
            raise ValueError(
                f'loss.projector = {kind!r}: write "i", "l", "m" or "mb", then optionally ",avg" and ",HIDDEN,OUT", '
                'such as "m,avg,512,1024"'
            )
        name, pooled, *widths = match.groups()
        hidden, out = map(int, widths) if widths[0] else getattr(block, "projector_widths", (512, 1024))
        shape = list(feature(block, output).shape[1:])
        layers: list[nn.Module] = []
        if per_token:
            if pooled or name == "mb":
                raise ValueError(
                    f'loss.projector = {kind!r}: of tokens there are "i", "l" and "m"; leave ",avg" and BatchNorm out'
                )
            shape = shape[-1:]
        if pooled:
            if len(shape) != 3:
                raise ValueError(
                    f'loss.projector = {kind!r}: ",avg" needs a (batch, channels, height, width) output, '
                    f'{type(block).__name__} gives {("batch", *shape)}; leave ",avg" out'
                )
            shape[1:] = [max(1, side // 2) for side in shape[1:]]
            layers.append(nn.AdaptiveAvgPool2d((shape[1], shape[2])))
        if not per_token:
            layers.append(nn.Flatten())
        width = math.prod(shape)
        if name == "l":
            layers.append(nn.Linear(width, out))
        elif name in ("m", "mb"):
            norm = [nn.BatchNorm1d(hidden)] if name == "mb" else []
            layers += [nn.Linear(width, hidden), *norm, nn.ReLU(), nn.Linear(hidden, out)]
        self.layers = nn.Sequential(*layers)


class Predictor(_Head):
    """Class scores from a block's feature: "l" Linear, "norm" LayerNorm-Linear, "sigmoid,2500" Linear-Sigmoid-Linear.

    No kind takes the block's ``predictor`` preference; one that is not of this form raises ValueError.
    """

    def __init__(
        self,
        block: nn.Module,
        output: Any,
        classes: int,
        kind: str | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        chosen = getattr(block, "predictor", "l") if kind is None else kind
        if not isinstance(chosen, str):
            self.layers = chosen(classes)
            return
        shape = feature(block, output).shape
        width = shape[-1] if per_token else math.prod(shape[1:])
        flat = [] if per_token else [nn.Flatten()]
        if chosen == "l":
            self.layers = nn.Sequential(*flat, nn.Linear(width, classes))
            return
        if chosen == NORM:
            self.layers = nn.Sequential(*flat, nn.LayerNorm(width), nn.Linear(width, classes))
            return
        match = _PREDICTOR.fullmatch(chosen)
        if match is None:
            raise ValueError(
                f'predictor {chosen!r}: write "l", "norm", or an activation and a width such as "sigmoid,2500" (relu, '
                "sigmoid, tanh)"
            )
        hidden = int(match[2])
        self.layers = nn.Sequential(
            *flat, nn.Linear(width, hidden), _ACTIVATIONS[match[1]](), nn.Linear(hidden, classes)
        )
