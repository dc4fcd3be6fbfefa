"""Models of torchvision, cut into blocks at their natural borders, that compute exactly what they did whole.

The activations inside these models are large: a projector that reads all of them would have hundreds of
millions of weights. So the heads of all blocks but the last see at most 4x4 places of an image, and of a
vision transformer the mean over its patches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models as zoo
from torchvision.models.convnext import ConvNeXt
from torchvision.models.efficientnet import EfficientNet
from torchvision.models.mobilenetv3 import MobileNetV3
from torchvision.models.resnet import ResNet
from torchvision.models.vgg import VGG
from torchvision.models.vision_transformer import VisionTransformer


def model_function(name: str) -> Callable[..., Sequence[nn.Module]]:
    """A model function that takes ``blocks``, see `blocks_of`, and the arguments of torchvision's of this name."""
    names = zoo.list_models(module=zoo)
    if name not in names:
        raise ValueError(
            f"model.name = 'torchvision:{name}': torchvision has no such classification model; it has "
            f"{', '.join(sorted(names))}"
        )

    def build(classes: int, blocks: int | None = None, **args: Any) -> Sequence[nn.Module]:
        try:
            model = zoo.get_model(name, num_classes=classes, **args)
        except TypeError as error:
            raise ValueError(f"model.args = {args!r}: {name} does not take them: {error}") from None
        return blocks_of(model, blocks)

    return build


def blocks_of(model: nn.Module, blocks: int | None = None) -> list[_Part]:
    """Cut a torchvision model into blocks up to its head, which is the ``predictor`` of the last one.

    None takes a block for each resolution of ResNet and VGG, and 4 otherwise.

    Raises:
        ValueError: a family that cannot be cut, or another number of blocks than the model has parts for.
    """
    parts, sizes, tail, head = _parts(model)
    if blocks is not None:
        if not 1 <= blocks <= len(parts):
            raise ValueError(f"model.args: blocks = {blocks}: give 1 to {len(parts)}, the number of parts")
        sizes = _even(len(parts), blocks)
    cut: list[_Part] = []
    start = 0
    for size in sizes[:-1]:
        cut.append(_Block(*parts[start : start + size]))
        start += size
    cut.append(_LastBlock(head, *parts[start:], tail))
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for block in cut:
        block.original_names = _original(block, names)
    cut[-1].original_names |= _original(head, names, "predictor.layers.")
    return cut


def _original(part: nn.Module, names: Mapping[int, str], prefix: str = "") -> dict[str, str]:
    """What the whole model calls the tensors of a part, for ``model.weights``."""
    return {prefix + name: names[id(tensor)] for name, tensor in part.state_dict(keep_vars=True).items()}


class _Part(nn.Sequential):
    """Consecutive parts of a model, and what it calls their tensors."""

    original_names: dict[str, str]


class _Block(_Part):
    """Consecutive parts whose heads read a summary of the output."""

    def feature(self, output: torch.Tensor) -> torch.Tensor:
        """At most 4x4 places of images ``(B, C, H, W)``, the mean over the tokens of ``(B, L, D)``."""
        if output.dim() == 3:
            return output.mean(1)
        return F.adaptive_avg_pool2d(output, (min(4, output.shape[2]), min(4, output.shape[3])))


class _LastBlock(_Part):
    """The last parts; knows the model's head but does not hold it, as heads are no part of blocks."""

    def __init__(self, head: nn.Module, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.predictor = lambda classes: copy.deepcopy(
            head
        )  # a function keeps it out of the block's parameters


class _Patches(nn.Module):
    """Image to tokens: the beginning of VisionTransformer.forward."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.patch_size, self.image_size = model.patch_size, model.image_size
        self.project = model.conv_proj
        self.class_token = model.class_token
        self.positions = model.encoder.pos_embedding
        self.dropout = model.encoder.dropout

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, S, S)`` to ``(B, 1 + patches, D)``."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {tuple(images.shape[2:])} pixels for a model of image_size = {self.image_size}: "
                "set model.args.image_size or the size of the data"
            )
        patches = self.project(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        placed: torch.Tensor = self.dropout(tokens + self.positions)
        return placed


class _ClassToken(nn.Module):
    """Picks the token that the head of a vision transformer reads."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(B, L, D)`` to ``(B, D)``."""
        return tokens[:, 0]


def _parts(model: nn.Module) -> tuple[Sequence[nn.Module], list[int], nn.Module, nn.Module]:
    """Parts in order, default number of parts of each block, what follows the last part, and the head."""
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        layers = [list(layer) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
        first, *sizes = (len(layer) for layer in layers)
        parts = [stem, *itertools.chain.from_iterable(layers)]
        return parts, [1 + first, *sizes], nn.Sequential(model.avgpool, nn.Flatten()), model.fc
    if isinstance(model, VisionTransformer):
        lowest, *others = model.encoder.layers
        parts = [nn.Sequential(_Patches(model), lowest), *others]
        tail = nn.Sequential(model.encoder.ln, _ClassToken())
        return parts, _even(len(parts), min(4, len(parts))), tail, model.heads
    if isinstance(model, VGG):
        parts = _after_pools(model.features)
        return parts, [1] * len(parts), nn.Sequential(model.avgpool, nn.Flatten()), model.classifier
    if isinstance(model, EfficientNet | MobileNetV3):
        parts = list(model.features)
        return parts, _even(len(parts), 4), nn.Sequential(model.avgpool, nn.Flatten()), model.classifier
    if isinstance(model, ConvNeXt):  # its head normalises before it flattens
        parts = list(model.features)
        return parts, _even(len(parts), 4), model.avgpool, model.classifier
    raise ValueError(
        f"model.name: {type(model).__name__} of torchvision cannot be cut; these can be: ResNet, VGG, "
        "VisionTransformer, ConvNeXt, EfficientNet and MobileNetV3"
    )


def _after_pools(layers: nn.Sequential) -> list[nn.Module]:
    """Group the layers of a VGG so that each group ends with a max-pooling."""
    groups: list[list[nn.Module]] = [[]]
    for layer in layers:
        groups[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            groups.append([])
    return [nn.Sequential(*group) for group in groups if group]


def _even(parts: int, blocks: int) -> list[int]:
    return [parts // blocks + (index < parts % blocks) for index in range(blocks)]
