"""Heads are built from shapes alone and follow the preferences of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scpl_dist.methods.heads import Predictor, Projector, feature


class Sequence(nn.Module):
    """A block that returns a dict and says how it is read."""

    projector_widths = (30, 20)
    predictor = "tanh,30"

    def feature(self, output: dict[str, torch.Tensor]) -> torch.Tensor:
        mean: torch.Tensor = output["tokens"].mean(dim=1)
        return mean


def linears(module: nn.Module) -> list[tuple[int, int]]:
    return [(part.in_features, part.out_features) for part in module.modules() if isinstance(part, nn.Linear)]


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("i", []),
        ("l", [(96, 1024)]),
        ("m", [(96, 512), (512, 1024)]),
        ("mb", [(96, 512), (512, 1024)]),
        ("m,64,32", [(96, 64), (64, 32)]),
        ("l,64,32", [(96, 32)]),
        ("m,avg", [(24, 512), (512, 1024)]),
        ("m,avg,64,32", [(24, 64), (64, 32)]),
    ],
)
def test_projector_kinds_have_the_published_layers(kind: str, layers: list[tuple[int, int]]) -> None:
    projector = Projector(kind, nn.Identity(), meta(2, 6, 4, 4))
    assert linears(projector) == layers
    out = layers[-1][1] if layers else 96
    assert projector(torch.randn(5, 6, 4, 4)).shape == (5, out)


def test_projector_m_computes_linear_relu_linear() -> None:
    projector = Projector("m,7,5", nn.Identity(), meta(2, 3, 2, 2))
    first, second = (part for part in projector.modules() if isinstance(part, nn.Linear))
    image = torch.randn(4, 3, 2, 2)
    expected = (image.reshape(4, 12) @ first.weight.T + first.bias).clamp(
        min=0
    ) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(image), expected)


def test_projector_mb_normalises_before_the_activation() -> None:
    projector = Projector("mb,7,5", nn.Identity(), meta(2, 12))
    kinds = [type(part) for part in projector.layers if not isinstance(part, nn.Flatten)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_avg_keeps_sides_of_one_pixel() -> None:
    assert Projector("l,avg,1,8", nn.Identity(), meta(2, 5, 1, 3))(torch.randn(2, 5, 1, 3)).shape == (2, 8)


def test_vgg8_projectors_have_the_published_number_of_parameters() -> None:
    counts = []
    with torch.device("meta"):
        for shape in [(2, 256, 16, 16), (2, 512, 8, 8), (2, 512, 4, 4), (2, 512, 2, 2)]:
            projector = Projector("m", nn.Identity(), torch.empty(shape))
            counts.append(round(sum(weight.numel() for weight in projector.parameters()) / 1e6, 1))
    assert counts == [34.1, 17.3, 4.7, 1.6]


def test_a_block_decides_feature_widths_and_predictor() -> None:
    block, output = Sequence(), {"tokens": meta(2, 9, 30)}
    assert linears(Projector("m", block, output)) == [(30, 30), (30, 20)]
    assert linears(Projector("m,8,4", block, output)) == [(30, 8), (8, 4)]
    predictor = Predictor(block, output, 3)
    assert linears(predictor) == [(30, 30), (30, 3)]
    assert any(isinstance(part, nn.Tanh) for part in predictor.modules())
    read = feature(block, {"tokens": torch.randn(5, 9, 30)})
    assert predictor(read).shape == (5, 3)


def test_feature_defaults_to_the_first_tensor() -> None:
    tensor = torch.randn(2, 3)
    assert feature(nn.Identity(), tensor) is tensor
    assert feature(nn.Identity(), (tensor, torch.zeros(2))) is tensor
    assert feature(nn.Identity(), {"hidden": tensor}) is tensor


def test_predictor_is_linear_unless_asked() -> None:
    assert linears(Predictor(nn.Identity(), meta(2, 4, 3), 10)) == [(12, 10)]
    assert linears(Predictor(nn.Identity(), meta(2, 4, 3), 10, kind="sigmoid,512")) == [(12, 512), (512, 10)]


def test_predictor_may_be_a_function_of_the_block() -> None:
    class Own(nn.Module):
        def predictor(self, classes: int) -> nn.Module:
            return nn.Linear(4, classes, bias=False)

    assert Predictor(Own(), meta(2, 4), 6)(torch.randn(3, 4)).shape == (3, 6)


@pytest.mark.parametrize("kind", ["", "x", "m,512", "m,0,8", "m,a,8", "avg", "m,8,8,avg", "m,avg,8"])
def test_unreadable_projector_is_refused_with_the_forms_that_work(kind: str) -> None:
    with pytest.raises(ValueError, match=r"loss\.projector = .*write "):
        Projector(kind, nn.Identity(), meta(2, 3, 4, 4))


def test_avg_needs_an_image() -> None:
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\).*\('batch', 12\)"):
        Projector("m,avg", nn.Identity(), meta(2, 12))


@pytest.mark.parametrize("kind", ["", "swish,4", "tanh", "tanh,0", "l,5"])
def test_unreadable_predictor_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="predictor"):
        Predictor(nn.Identity(), meta(2, 3), 4, kind=kind)
