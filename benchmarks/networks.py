"""The networks of the speed benchmarks.

A CNN, a Transformer encoder and an LSTM whose halves cost the same, a CNN whose halves do not, and pure delays.
Everything is reachable by name, as `scpl-dist` needs it, and used by plain PyTorch and torch's own pipelines as well.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from scpl_dist import models
from scpl_dist.models.vgg import Layers, vgg_blocks

CLASSES = 10
Parts = tuple[TensorDataset, TensorDataset, TensorDataset]
"""Training, validation and test set."""


class TokenMean(nn.Module):
    """Mean over the positions of (N, tokens, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Give (N, width)."""
        return tokens.mean(1)


class EncoderBlock(nn.TransformerEncoderLayer):
    """A pre-norm encoder layer whose feature is the mean over positions."""

    projector_widths = (256, 256)

    def __init__(self) -> None:
        super().__init__(256, 8, 512, dropout=0.0, batch_first=True, norm_first=True)

    def feature(self, output: Tensor) -> Tensor:
        """Input of the heads, (N, 256)."""
        return output.mean(1)


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, ReLU; a feature pooled to 4x4 keeps the projector small beside the convolution."""

    projector_widths = (128, 128)

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def feature(self, output: Tensor) -> Tensor:
        """Input of the heads, (N, channels, 4, 4)."""
        return nn.functional.adaptive_avg_pool2d(output, 4)


class RecurrentBlock(nn.Module):
    """A bidirectional LSTM layer, (N, words, entering) to (N, words, 2 * width); its feature is the mean over words."""

    projector_widths = (128, 128)

    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(entering, width, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor) -> Tensor:
        """The outputs of both directions."""
        outputs: Tensor = self.layer(words)[0]
        return outputs

    def feature(self, output: Tensor) -> Tensor:
        """Input of the heads, (N, 2 * width)."""
        return output.mean(1)


class Delay(nn.Module):
    """A stage that takes a given time in which the processor is free, as if it computed on a device of its own."""

    projector_widths = (8, 8)

    def __init__(self, seconds: float, samples: int | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.samples = samples
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Sleep, then give the input."""
        if self.training:
            time.sleep(self.seconds * (len(x) / self.samples if self.samples else 1))
        return x * self.scale


def nothing(features: Tensor, labels: Tensor) -> Tensor:
    """A local loss that costs nothing, so that a `Delay` takes its seconds and the rest is the runtime's."""
    return features.mean()


def transformer(classes: int, layers: int = 6) -> list[Callable[[], nn.Module]]:
    """Equal encoder layers; inputs are (N, 32, 256)."""
    return [EncoderBlock] * layers


def cnn(classes: int) -> list[Callable[[], nn.Module]]:
    """Four convolutions of equal cost; inputs are (N, 64, 16, 16)."""
    return [partial(ConvBlock, 64, 64, 1)] * 4


def vgg28(classes: int) -> list[Callable[[], nn.Module]]:
    """A VGG of 7 convolutions in 4 blocks for (N, 1, 28, 28), 0.1 million weights: minutes to train on one core."""
    return vgg_blocks([(16, "M"), (32, 32, "M"), (64, 64, "M"), (64, 64)], 1, (128, 128), "l")


class Joined(nn.Sequential):
    """Blocks that learn as one; the last of them says how the output is read."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        for preference in ("feature", "projector_widths", "classifier", "predictor"):
            if hasattr(blocks[-1], preference):
                setattr(self, preference, getattr(blocks[-1], preference))


def resnet(classes: int, joined: int = 1) -> list[nn.Module]:
    """ResNet18 with an eighth of its channels for grey images, whose sides it halves; `joined` of 4 blocks as one."""
    blocks = [make() for make in models.resolve("resnet_tiny", {"width": 8})(classes)]
    parts = [blocks[begin : begin + joined] for begin in range(0, len(blocks), joined)]
    return [Joined(nn.AvgPool2d(2), *parts[0]), *(Joined(*part) for part in parts[1:])]


def uneven_cnn(classes: int) -> list[Callable[[], nn.Module]]:
    """Four convolutions as in a real network, each with half the activations of the one before; (N, 3, 32, 32)."""
    widths = (3, 64, 128, 256, 256)
    return [
        partial(ConvBlock, entering, width, 1 + (index > 0))
        for index, (entering, width) in enumerate(itertools.pairwise(widths))
    ]


def vgg8_eighth(classes: int) -> list[Callable[[], nn.Module]]:
    """VGG8 of the SCPL paper with an eighth of its channels and widths; inputs are (N, 3, 32, 32)."""
    plan: list[Layers] = [(16, 32, "M"), (32, 64, "M"), (64, "M"), (64, "M")]
    return vgg_blocks(plan, 3, (64, 128), "sigmoid,312")


def lstm(classes: int) -> list[Callable[[], nn.Module]]:
    """Four bidirectional layers of equal cost; inputs are (N, 32, 256)."""
    return [partial(RecurrentBlock, 256, 128)] * 4


def delays(classes: int, stages: int, seconds: float) -> list[Callable[[], nn.Module]]:
    """One delay for each stage."""
    return [lambda: Delay(seconds)] * stages


def uneven(classes: int, samples: int, seconds: float) -> list[Callable[[], nn.Module]]:
    """Two delays, the second twice as long; with fewer samples each is shorter."""
    return [lambda: Delay(seconds, samples), lambda: Delay(2 * seconds, samples)]


def _data(shape: Sequence[int], size: int) -> Parts:
    return _labelled(torch.randn(size, *shape, generator=torch.Generator().manual_seed(0)))


def _labelled(inputs: Tensor) -> Parts:
    labels = torch.arange(len(inputs)) % CLASSES
    few = TensorDataset(inputs[:CLASSES], labels[:CLASSES])
    return TensorDataset(inputs, labels), few, few


def text_data(root: str, size: int, length: int, vocabulary: int) -> Parts:
    """Random texts of `length` words each, none of them padding."""
    generator = torch.Generator().manual_seed(0)
    return _labelled(torch.randint(1, vocabulary, (size, length), generator=generator))


def token_data(root: str, size: int) -> Parts:
    """Random (32, 256) inputs."""
    return _data((32, 256), size)


def image_data(root: str, size: int) -> Parts:
    """Random (64, 16, 16) inputs."""
    return _data((64, 16, 16), size)


def photo_data(root: str, size: int) -> Parts:
    """Random (3, 32, 32) inputs."""
    return _data((3, 32, 32), size)


def clothing_data(root: str, size: int) -> Parts:
    """Random (1, 28, 28) inputs."""
    return _data((1, 28, 28), size)


def small_data(root: str, size: int) -> Parts:
    """Random vectors of 64 numbers."""
    return _data((64,), size)
