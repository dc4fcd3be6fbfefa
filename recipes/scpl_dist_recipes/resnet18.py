"""ResNet18 in four blocks, one for each width, in the two forms that the published code has.

Both have LeakyReLU, no max-pooling stem, and a shortcut with weights only where a unit halves the image. In
`resnet18_3x3`, the original setting, that shortcut is a 3x3 convolution and the last block averages its
output over the image; in `resnet18` it is a 1x1 convolution and the local loss of the last block sees the
whole image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn


class _Unit(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride."""

    def __init__(self, channels: int, width: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(width),
            )
        self.activation = nn.LeakyReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        summed: torch.Tensor = self.activation(self.residual(images) + self.shortcut(images))
        return summed


class _Pooled(nn.Sequential):
    """A block whose predictor averages over the image before it classifies."""

    def __init__(self, width: int, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.width = width

    def predictor(self, classes: int) -> nn.Module:
        """Average over the image, then a linear layer."""
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, classes))


def resnet18(classes: int, channels: int = 3, width: int = 64) -> list[Callable[[], nn.Module]]:
    """ResNet18 with 1x1 shortcuts, for 32x32 images; `width` is the number of channels of block 0."""
    return [partial(_block, index, channels, width, kernel=1) for index in range(4)]


def resnet18_3x3(classes: int, channels: int = 3, width: int = 64) -> list[Callable[[], nn.Module]]:
    """ResNet18 with 3x3 shortcuts and a pooled last output, for 32x32 images: 12.6 million parameters."""
    return [partial(_block, index, channels, width, kernel=3) for index in range(4)]


def resnet_tiny(classes: int, channels: int = 1, width: int = 16) -> list[Callable[[], nn.Module]]:
    """`resnet18` with a quarter of its channels, for 16x16 images in grey."""
    return resnet18(classes, channels, width)


def _block(index: int, channels: int, width: int, kernel: int) -> nn.Module:
    wide = width * 2**index
    if index == 0:
        stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        units = [_Unit(width, width, 1, kernel) for _ in range(2)]
        return nn.Sequential(*stem, nn.LeakyReLU(inplace=True), *units)
    units = [_Unit(wide // 2, wide, 2, kernel), _Unit(wide, wide, 1, kernel)]
    if index < 3:
        return nn.Sequential(*units)
    if kernel == 3:
        return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1))
    return _Pooled(wide, *units)
