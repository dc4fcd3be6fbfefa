"""A torchvision model in blocks computes what it computed whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from scpl_dist import models
from scpl_dist.methods.heads import Predictor, Projector, feature
from scpl_dist.models import weights
from scpl_dist_recipes.torchvision import blocks_of


def vit() -> nn.Module:
    model: nn.Module = zoo.VisionTransformer(
        32, 8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=7
    )
    return model


def vgg() -> nn.Module:
    model: nn.Module = zoo.VGG(
        zoo.vgg.make_layers([8, "M", 8, 8, "M", 16, "M"], batch_norm=True), init_weights=False
    )
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 7))
    return model


def convnext() -> nn.Module:
    settings = [zoo.convnext.CNBlockConfig(8, 16, 1), zoo.convnext.CNBlockConfig(16, None, 2)]
    model: nn.Module = zoo.ConvNeXt(settings, num_classes=7)
    return model


SMALL: list[tuple[Callable[[], nn.Module], int, int]] = [
    (lambda: zoo.resnet18(num_classes=7), 64, 4),
    (lambda: zoo.ResNet(zoo.resnet.Bottleneck, [1, 2, 1, 1], num_classes=7), 64, 4),
    (vgg, 64, 3),
    (vit, 32, 4),
    (lambda: zoo.mobilenet_v3_small(num_classes=7), 64, 4),
    (lambda: zoo.efficientnet_b0(num_classes=7), 64, 4),
    (convnext, 64, 4),
]
NAMES = ["resnet18", "bottlenecks", "vgg", "vit", "mobilenet", "efficientnet", "convnext"]


@pytest.mark.parametrize(("make", "size", "count"), SMALL, ids=NAMES)
def test_blocks_and_head_equal_the_whole_model(make: Callable[[], nn.Module], size: int, count: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    images = torch.randn(3, 3, size, size)
    expected = model(images)
    blocks = blocks_of(model)
    assert len(blocks) == count
    specs = models.trace(blocks, images)
    value = images
    for block, spec in zip(blocks, specs, strict=True):
        value = block.eval()(value)
        assert value.shape[1:] == spec.shape[1:]
    predictor = Predictor(blocks[-1], specs[-1], 7).eval()
    assert torch.equal(predictor(feature(blocks[-1], value)), expected)


@pytest.mark.parametrize(("make", "size", "count"), SMALL, ids=NAMES)
def test_every_parameter_is_in_one_block_or_the_head(
    make: Callable[[], nn.Module], size: int, count: int
) -> None:
    with torch.device("meta"):
        model = make()
    total = sum(weight.numel() for weight in model.parameters())
    blocks = blocks_of(model)
    predictor = Predictor(blocks[-1], torch.zeros(2, 1), 7)
    parts = [*blocks, predictor]
    assert sum(weight.numel() for part in parts for weight in part.parameters()) == total


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_number_of_blocks_can_be_chosen(blocks: int) -> None:
    torch.manual_seed(0)
    model = vit().eval()
    images = torch.randn(2, 3, 32, 32)
    value = images
    cut = blocks_of(model, blocks)
    assert len(cut) == blocks
    for block in cut:
        value = block(value)
    assert torch.equal(Predictor(cut[-1], value, 7).eval()(value), model(images))


def test_heads_in_the_middle_read_a_summary() -> None:
    blocks = blocks_of(zoo.resnet18(num_classes=7))
    specs = models.trace(blocks, torch.zeros(2, 3, 224, 224))
    assert [tuple(spec.shape) for spec in specs] == [
        (2, 64, 56, 56),
        (2, 128, 28, 28),
        (2, 256, 14, 14),
        (2, 512),
    ]
    widths = [feature(block, spec).flatten(1).shape[1] for block, spec in zip(blocks, specs, strict=True)]
    assert widths == [64 * 16, 128 * 16, 256 * 16, 512]
    assert Projector("m", blocks[0], specs[0])(torch.zeros(2, 64, 4, 4)).shape == (2, 1024)


def test_models_are_found_by_name() -> None:
    args = {"image_size": 32, "blocks": 12}
    blocks, specs = models.outline("torchvision:vit_b_16", args, 10, torch.zeros(2, 3, 32, 32))
    assert len(blocks) == 12
    assert specs[-1].shape == (2, 768)
    assert all(weight.is_meta for block in blocks for weight in block.parameters())
    for name, last in [("resnet50", 2048), ("vgg11_bn", 25088)]:
        _, specs = models.outline(f"torchvision:{name}", {}, 10, torch.zeros(2, 3, 32, 32))
        assert specs[-1].shape == (2, last)


def test_weights_depend_on_the_seed_only() -> None:
    first, again, other = (
        models.build("torchvision:resnet18", {}, 10, seed, blocks=[3])[0].state_dict() for seed in (0, 0, 1)
    )
    key = "0.conv1.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


def test_copies_of_the_head_are_independent() -> None:
    last = blocks_of(vit())[-1]
    one, two = (Predictor(last, torch.zeros(2, 16), 7) for _ in range(2))
    with torch.no_grad():
        next(one.parameters()).add_(1)
    assert not torch.equal(next(one.parameters()), next(two.parameters()))


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("resnet19", {}, r"'torchvision:resnet19': .*it has .*resnet18"),
        ("alexnet", {}, "AlexNet of torchvision cannot be cut; these can be: ResNet"),
        ("resnet18", {"blocks": 10}, r"blocks = 10: give 1 to 9"),
        ("resnet18", {"depth": 10}, r"model\.args = \{'depth': 10\}: resnet18 does not take them"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, args: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.build(f"torchvision:{name}", args, 10, 0, device="meta")


def test_images_of_another_size_are_refused_by_a_vision_transformer() -> None:
    with pytest.raises(
        ValueError, match=r"block 0 .*images of \(32, 32\) pixels for a model of image_size = 224"
    ):
        models.outline("torchvision:vit_b_16", {}, 10, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(("make", "size", "count"), SMALL, ids=NAMES)
def test_weights_of_the_whole_model_are_those_of_its_blocks(
    make: Callable[[], nn.Module], size: int, count: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = make().eval()
    path = tmp_path / "whole.pth"
    torch.save(model.state_dict(), path)
    images = torch.randn(2, 3, size, size)
    blocks = [block.eval() for block in blocks_of(make())]
    value = images
    modules = {}
    for index, block in enumerate(blocks):
        value = block(value)
        last = index == count - 1
        heads = {"predictor": Predictor(block, value, 7)} if last else {}
        modules[index] = (block, nn.ModuleDict(heads).eval())
    assert weights.load(str(path), modules, strict=True, whole=True) == ""
    value = images
    for block, _ in modules.values():
        value = block(value)
    torch.testing.assert_close(modules[count - 1][1]["predictor"](value), model(images))


def test_published_weights_come_from_the_cache_or_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    [*blocks] = models.build("torchvision:resnet18", {}, 10, seed=1)
    modules = {index: (block, nn.ModuleDict()) for index, block in enumerate(blocks)}
    modules[3][1]["predictor"] = Predictor(blocks[3], torch.empty(2, 512), 10)  # not of its 1000 classes

    def unreachable(url: str, *args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth could not be downloaded .*give its path"):
        weights.load(name, modules, strict=True, whole=True)
    with pytest.raises(ValueError, match=r"ResNet18_Weights\.IMAGENET1K_V1$"):
        weights.load("torchvision:ResNet18", modules, strict=True, whole=True)
    published = zoo.resnet18()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    assert weights.load(name, modules, strict=True, whole=True) == ""
    assert torch.equal(next(blocks[0].parameters()), published.conv1.weight)
