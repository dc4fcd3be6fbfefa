"""VGG networks in four blocks: the published VGG8 and a tiny one for 16x16 digits.

Sizes of `vgg8` are those of the published SCPL code (arXiv 2602.00062). `vgg_tiny` is shaped so that its
blocks cost about the same including their local loss, which a pipeline of any number of stages profits from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

Layers = Sequence[int | str]


class _ConvBlock(nn.Sequential):
    """3x3 convolutions without bias, each with BatchNorm and ReLU; "M" halves height and width."""

    def __init__(self, channels: int, layers: Layers, widths: tuple[int, int], predictor: str) -> None:
        modules: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.MaxPool2d(2))
                continue
            modules += [
                nn.Conv2d(channels, layer, 3, padding=1, bias=False),
                nn.BatchNorm2d(layer),
                nn.ReLU(inplace=True),
            ]
            channels = layer
        super().__init__(*modules)
        self.projector_widths = widths
        self.predictor = predictor


def vgg8(classes: int, channels: int = 3) -> list[Callable[[], nn.Module]]:
    """VGG8 for 32x32 images: 6 convolutions in 4 blocks, 6.8 million parameters."""
    plan: list[Layers] = [(128, 256, "M"), (256, 512, "M"), (512, "M"), (512, "M")]
    return _factories(plan, channels, (512, 1024), "sigmoid,2500")


def vgg_tiny(classes: int, channels: int = 1) -> list[Callable[[], nn.Module]]:
    """A VGG of 8 convolutions in 4 blocks of similar cost for 16x16 images, 0.3 million parameters."""
    plan: list[Layers] = [(16, 16, "M"), (48, 48, "M"), (96, 96), (96, 96)]
    return _factories(plan, channels, (128, 128), "l")


def _factories(
    plan: Sequence[Layers], channels: int, widths: tuple[int, int], predictor: str
) -> list[Callable[[], nn.Module]]:
    factories: list[Callable[[], nn.Module]] = []
    for layers in plan:
        factories.append(partial(_ConvBlock, channels, layers, widths, predictor))
        channels = [layer for layer in layers if isinstance(layer, int)][-1]
    return factories
