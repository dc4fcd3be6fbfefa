"""Models are built block by block with the same weights everywhere, and misfits are found from shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scpl_dist import models

PLAIN = """
import torch
from torch import nn

def modules(classes, width=8):
    return [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width)]

def factories(classes):
    return [lambda: nn.Linear(4, 8), lambda: nn.Linear(8, 8)]

def misfit(classes):
    return [nn.Linear(4, 8), nn.Linear(9, 3)]

def number(classes):
    return 3

def strings(classes):
    return ["conv"]

def wrong_factory(classes):
    return [lambda: 3]

class Looks(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() >= 0 else x

def looks(classes):
    return [nn.Linear(4, 8), Looks(), nn.BatchNorm1d(8)]

class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(8).tolist()  # needs values, so not on meta

    def forward(self, x):
        return x * torch.tensor(self.table)

def constant(classes):
    return [nn.Linear(4, 8), Constant()]

def restored(classes):
    first = nn.Linear(4, 8)
    first.load_state_dict({"weight": torch.full((8, 4), 7.0), "bias": torch.zeros(8)})
    return [first, nn.Linear(8, 8)]

def raising(classes):
    return [nn.Linear(4, 8), nn.Linear(8, "wide")]

def raising_factory(classes):
    return [lambda: nn.Linear(4, 8), lambda: nn.Linear(8, undefined)]

class Total(nn.Module):
    def forward(self, x):
        return x.sum()

def total(classes):
    return [nn.Linear(4, 8), Total()]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(PLAIN)
    return str(path)


def shapes(specs: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(spec.shape) for spec in specs]


def parameters(blocks: list[nn.Module]) -> list[int]:
    return [sum(weight.numel() for weight in block.parameters()) for block in blocks]


def test_vgg_tiny_fits_16x16_images() -> None:
    _, specs = models.outline("vgg_tiny", {}, 10, torch.zeros(2, 1, 16, 16))
    assert shapes(specs) == [(2, 16, 8, 8), (2, 48, 4, 4), (2, 96, 4, 4), (2, 96, 4, 4)]


@pytest.mark.parametrize("name", ["vgg_tiny", "resnet_tiny", "transformer_tiny"])
def test_a_block_built_alone_has_the_weights_it_has_in_the_whole(name: str) -> None:
    whole = models.build(name, {}, 10, seed=3)
    for index in (3, 1):
        (alone,) = models.build(name, {}, 10, seed=3, blocks=[index])
        for key, value in whole[index].state_dict().items():
            assert torch.equal(value, alone.state_dict()[key]), (index, key)


def test_weights_come_from_the_seed_and_not_from_global_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = models.build("vgg_tiny", {}, 10, seed=0, blocks=[1])[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = models.build("vgg_tiny", {}, 10, seed=0, blocks=[1])[0]
    other = models.build("vgg_tiny", {}, 10, seed=1, blocks=[1])[0]
    weights = [next(iter(block.parameters())) for block in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_blocks_on_meta_take_no_memory() -> None:
    (block,) = models.build("vgg8", {}, 10, seed=0, blocks=[2], device="meta")
    assert all(weight.is_meta for weight in block.parameters())


@pytest.mark.parametrize("function", ["modules", "factories"])
def test_users_models_of_both_forms_are_built_and_repeatable(own: str, function: str) -> None:
    name = f"{own}:{function}"
    first, again = (models.build(name, {}, 3, seed=0, blocks=[0]) for _ in range(2))
    assert torch.equal(next(first[0].parameters()), next(again[0].parameters()))
    _, specs = models.outline(name, {}, 3, torch.zeros(2, 4))
    assert set(shapes(specs)) == {(2, 8)}


def test_model_args_reach_the_function(own: str) -> None:
    _, specs = models.outline(f"{own}:modules", {"width": 5}, 3, torch.zeros(2, 4))
    assert shapes(specs) == [(2, 5)] * 3
    _, specs = models.outline("vgg_tiny", {"channels": 3}, 3, torch.zeros(2, 3, 16, 16))
    assert shapes(specs)[0] == (2, 16, 8, 8)


def test_unknown_names_and_args_are_refused(own: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"model\.name = 'vgg9': unknown; use one of vgg_tiny, gpt, hf:NAME, torchvision:NAME, .*vgg8",
    ):
        models.resolve("vgg9", {})
    with pytest.raises(ValueError, match=r"model\.args = \{'depth': 3\}: vgg8 cannot be called"):
        models.resolve("vgg8", {"depth": 3})
    with pytest.raises(ValueError, match=r"model\.args\.channels = '3': input should be a valid integer"):
        models.build("vgg8", {"channels": "3"}, 10, 0)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("number", "returned int, give a list"),
        ("strings", "block 0 is str, not nn.Module"),
        ("wrong_factory", "block 0 is int, not nn.Module"),
    ],
)
def test_functions_that_return_no_blocks_are_refused(own: str, function: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.build(f"{own}:{function}", {}, 3, 0)


@pytest.mark.parametrize(
    ("function", "says"),
    [("raising", "TypeError: "), ("raising_factory", "NameError: name 'undefined' is not defined")],
)
def test_what_a_model_function_raises_is_told_with_its_place(own: str, function: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"'{own}:{function}': {own}, line \d+: {says}"):
        models.outline(f"{own}:{function}", {}, 3, torch.zeros(2, 4))


def test_weights_that_a_model_function_reads_are_used_and_said_nothing_of(
    own: str, recwarn: pytest.WarningsRecorder
) -> None:
    models.outline(f"{own}:restored", {}, 3, torch.zeros(2, 4))
    assert [str(warning.message) for warning in recwarn] == []
    (block,) = models.build(f"{own}:restored", {}, 3, seed=0, blocks=[0])
    assert torch.equal(block.state_dict()["weight"], torch.full((8, 4), 7.0))


def test_a_block_that_does_not_fit_is_named_with_both_shapes(own: str) -> None:
    with pytest.raises(
        ValueError, match=r"block 1 \(Linear, weight of shape \(3, 9\)\) .*\(2, 8\) from block 0"
    ):
        models.outline(f"{own}:misfit", {}, 3, torch.zeros(2, 4))
    with pytest.raises(
        ValueError, match=r"block 0 \(_ConvBlock.*\(16, 1, 3, 3\)\) .*\(2, 3, 16, 16\) from the data"
    ):
        models.outline("vgg_tiny", {}, 3, torch.zeros(2, 3, 16, 16))


def test_an_output_without_a_batch_dimension_is_refused(own: str) -> None:
    with pytest.raises(ValueError, match=r"block 1 \(Total\) returns \(\) for 2 samples.*batch"):
        models.outline(f"{own}:total", {}, 3, torch.zeros(2, 4))


@pytest.mark.parametrize("function", ["looks", "constant"])
def test_blocks_that_need_values_are_traced_on_the_cpu(own: str, function: str) -> None:
    _, specs = models.outline(f"{own}:{function}", {}, 3, torch.zeros(2, 4))
    assert set(shapes(specs)) == {(2, 8)}
    assert all(spec.is_meta for spec in specs)


def test_tracing_changes_no_state_and_no_mode() -> None:
    blocks = models.build("vgg_tiny", {}, 10, seed=0)
    blocks[1].eval()
    before = [{key: value.clone() for key, value in block.state_dict().items()} for block in blocks]
    models.trace(blocks, torch.zeros(2, 1, 16, 16))
    for block, state in zip(blocks, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert [block.training for block in blocks] == [True, False, True, True]


def test_specs_keep_structure_and_dtype() -> None:
    value = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "mask": (torch.ones(2, dtype=torch.bool), 1.5)}
    made = models.spec(value)
    assert made["tokens"].is_meta
    assert made["tokens"].dtype == torch.int64
    assert made["mask"][0].dtype == torch.bool
    assert made["mask"][1] == 1.5
