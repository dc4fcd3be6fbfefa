"""VGG networks as blocks, and the tiny one of the main job, for 16x16 digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

Layers = Sequence[int | str]


def vgg_blocks(
    plan: Sequence[Layers], channels: int, widths: tuple[int, int], predictor: str
) -> list[Callable[[], nn.Module]]:
    """Functions that build the blocks of a VGG network, for images with a number of `channels`.

    The `plan` has the layers of each block: channels of a 3x3 convolution without bias, with BatchNorm and ReLU, or "M"
    for a max-pooling that halves height and width. `widths` are the default widths of the blocks' projectors and
    `predictor` is the kind of the last block's predictor, see `scpl_dist.methods.heads`.
    """
    factories: list[Callable[[], nn.Module]] = []
    for layers in plan:
        factories.append(partial(_ConvBlock, channels, layers, widths, predictor))
        channels = [layer for layer in layers if isinstance(layer, int)][-1]
    return factories


class _ConvBlock(nn.Sequential):
    def __init__(self, channels: int, layers: Layers, widths: tuple[int, int], predictor: str) -> None:
        modules: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(channels, layer, 3, padding=1, bias=False)
            modules += [convolution, nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
            channels = layer
        super().__init__(*modules)
        self.projector_widths = widths
        self.predictor = predictor


def vgg_tiny(classes: int, channels: int = 1) -> list[Callable[[], nn.Module]]:
    """8 convolutions in 4 blocks that cost about the same with their losses, for 16x16 images, 0.3 million weights."""
    plan: list[Layers] = [(16, 16, "M"), (48, 48, "M"), (96, 96), (96, 96)]
    return vgg_blocks(plan, channels, (128, 128), "l")
