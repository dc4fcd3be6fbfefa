"""The image networks of the recipes are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scpl_dist import models
from scpl_dist.methods.heads import Predictor


def shapes(specs: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(spec.shape) for spec in specs]


def parameters(blocks: list[nn.Module]) -> list[int]:
    return [sum(weight.numel() for weight in block.parameters()) for block in blocks]


def test_vgg8_has_the_published_sizes() -> None:
    blocks, specs = models.outline("vgg8", {}, 10, torch.zeros(2, 3, 32, 32))
    assert shapes(specs) == [(2, 256, 16, 16), (2, 512, 8, 8), (2, 512, 4, 4), (2, 512, 2, 2)]
    assert [round(count / 1e6, 2) for count in parameters(blocks)] == [0.30, 1.77, 2.36, 2.36]


def test_resnet18_has_the_published_sizes() -> None:
    blocks, specs = models.outline("resnet18_3x3", {}, 10, torch.zeros(2, 3, 32, 32))
    assert shapes(specs) == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 1, 1)]
    assert [round(count / 1e6, 2) for count in parameters(blocks)] == [0.15, 0.59, 2.36, 9.44]


def test_the_two_resnets_differ_in_shortcut_and_last_output() -> None:
    blocks, specs = models.outline("resnet18", {}, 10, torch.zeros(2, 3, 32, 32))
    assert shapes(specs)[-1] == (2, 512, 4, 4)
    saved = (9 - 1) * (64 * 128 + 128 * 256 + 256 * 512)
    other, _ = models.outline("resnet18_3x3", {}, 10, torch.zeros(2, 3, 32, 32))
    assert sum(parameters(other)) - sum(parameters(blocks)) == saved
    predictor = Predictor(blocks[-1], specs[-1], 10)
    features = torch.randn(2, 512, 4, 4)
    (linear,) = (part for part in predictor.modules() if isinstance(part, nn.Linear))
    torch.testing.assert_close(predictor(features), linear(features.mean((2, 3))))


def test_resnet18_is_torchvisions_with_its_stem_and_activation() -> None:
    """The same units: torchvision's network computes the same once stem, pooling and ReLU are replaced."""
    from torchvision.models import resnet18

    oracle = resnet18(num_classes=10)
    oracle.conv1, oracle.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for module in list(oracle.modules()):
        if hasattr(module, "relu"):
            module.relu = nn.LeakyReLU()
    blocks = models.build("resnet18", {}, 10, seed=0)
    weights = [value for block in blocks for value in block.state_dict().values()]
    state = {key: value for key, value in oracle.state_dict().items() if not key.startswith("fc")}
    # torchvision registers a unit's shortcut last, as here, so the order of the tensors is the same
    oracle.load_state_dict(dict(zip(state, weights, strict=True)), strict=False)
    predictor = Predictor(blocks[-1], torch.zeros(2, 512, 4, 4), 10)
    oracle.fc = next(part for part in predictor.modules() if isinstance(part, nn.Linear))
    value = images = torch.randn(4, 3, 32, 32)
    for block in blocks:
        value = block(value)
    torch.testing.assert_close(predictor(value), oracle(images))


def test_images_too_small_for_the_pooling_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block 3 .*does not fit"):
        models.outline("vgg8", {}, 3, torch.zeros(2, 3, 8, 8))
