"""First weights: the forms of files, what fits, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scpl_dist import data
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.models import weights
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from tests.support import in_threads

State = dict[str, Tensor]


def blocks(seed: int = 0, width: int = 5) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, width)),
    ]


def take(path: Path, made: list[nn.Module], strict: bool = True) -> str:
    modules = {index: (block, nn.ModuleDict()) for index, block in enumerate(made)}
    return weights.load(str(path), modules, strict, whole=True)


def save_sharded(state: State, folder: Path) -> None:
    folder.mkdir()
    parts = {f"model-0000{number}.safetensors": name for number, name in enumerate(state)}
    for part, name in parts.items():
        save_file({name: state[name]}, folder / part)
    index = {"weight_map": {name: part for part, name in parts.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: torch.save(state, path.with_suffix(".pt")),
        lambda state, path: torch.save(state, path.with_suffix(".pt"), _use_new_zipfile_serialization=False),
        lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path.with_suffix(".pt")),
        lambda state, path: torch.save(
            {f"module.{name}": value for name, value in state.items()}, path.with_suffix(".pt")
        ),
        lambda state, path: save_file(state, path.with_suffix(".safetensors")),
        lambda state, path: save_file(
            {f"blocks.{name}": value for name, value in state.items()}
            | {"heads.0.projector.bias": torch.ones(3)},
            path.with_suffix(".safetensors"),
        ),
        lambda state, path: save_sharded(state, path),
    ],
    ids=["torch", "old torch", "nested", "wrapped", "safetensors", "export", "shards"],
)
def test_a_state_is_taken_from_every_kind_of_file(save: Any, tmp_path: Path) -> None:
    source, made = nn.Sequential(*blocks(1)), blocks(2)
    source(torch.randn(4, 1, 4, 4))  # moves the running averages
    save(source.state_dict(), tmp_path / "first")
    (path,) = tmp_path.iterdir()
    assert take(path, made) == ""
    for name, value in nn.Sequential(*made).state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_cut_network_says_what_its_tensors_were_called(tmp_path: Path) -> None:
    made: list[Any] = blocks(2)
    for block, letter in zip(made, "ab", strict=True):
        block.original_names = {name: f"{letter}/{name}" for name in block.state_dict()}
    made[1].original_names["predictor.layers.weight"] = "head"
    heads = nn.ModuleDict({"predictor": nn.ModuleDict({"layers": nn.Linear(5, 3, bias=False)})})
    state = {
        f"{'ab'[int(name[0])]}/{name[2:]}": value
        for name, value in nn.Sequential(*blocks(1)).state_dict().items()
    }
    path = tmp_path / "whole.pt"
    for head in (torch.ones(3, 5), torch.zeros(7, 5)):  # the second is of other classes: it is not needed
        torch.save(state | {"head": head}, path)
        assert weights.load(str(path), {0: (made[0], nn.ModuleDict()), 1: (made[1], heads)}, True, True) == ""
        assert torch.equal(made[1][1].weight, state["b/1.weight"])
        assert bool(heads.state_dict()["predictor.layers.weight"].eq(1).all())


def test_what_does_not_fit_is_listed_and_left_alone_where_that_is_allowed(tmp_path: Path) -> None:
    state = nn.Sequential(*blocks(1)).state_dict()
    del state["0.0.bias"], state["0.1.num_batches_tracked"]  # the last of which older files do not have
    path = tmp_path / "other.pt"
    torch.save(state | {"2.weight": torch.ones(1)}, path)
    made = blocks(2, width=6)
    before = made[1][1].weight.clone()  # type: ignore[index]
    text = (
        f"model.weights = '{path}' does not fit the model: 1 missing (0.0.bias); 2 of another shape (1.1.weight is "
        "(5, 16), of the model (6, 16), 1.1.bias is (5,), of the model (6,)); 1 unexpected (2.weight)"
    )
    with pytest.raises(ValueError, match=r"set model.weights_strict = false to draw the rest") as caught:
        take(path, made)
    assert str(caught.value).startswith(text)
    assert take(path, made, strict=False) == f"{text}; the rest is drawn at random"
    assert torch.equal(made[0][0].weight, state["0.0.weight"])  # type: ignore[index]
    assert torch.equal(made[1][1].weight, before)  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no .*; check the path"),
        (b"no weights", "cannot be read .*; give a file of safetensors or of torch.save"),
        ([1, 2], "holds list, not tensors by name"),
        ({"x": torch.ones(1)}, "no name is one of the blocks"),
        (
            {"0.0.weight": torch.full((4, 1, 3, 3), torch.nan)},
            "0.0.weight is NaN or infinite; take other weights",
        ),
    ],
)
def test_what_are_no_weights_is_refused(content: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "first.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=problem):
        take(path, blocks(), strict=False)


def exported(trainables: dict[int, TrainableBlock]) -> State:
    return {
        f"{part}.{index}.{name}": value
        for index, own in trainables.items()
        for part, module in (("blocks", own.block), ("heads", own.heads))
        for name, value in module.state_dict().items()
    }


def test_a_run_starts_from_them_alike_with_any_number_of_stages(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    settings = {
        "data.batch_size": 512,
        "data.augmentation": "none",
        "run.epochs": 1,
        "model.weights": str(path),
    }
    config = load(values=settings)
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    other = Plan.plan(load(values={"run.seed": 7}), source.classes, source.example())
    first = exported(other.trainables(range(4)))
    save_file(first, path)
    assert list(plan.unfit()) == []
    halves = plan.trainables([0, 1]), plan.trainables([2, 3])
    for half in halves:  # each stage its own
        assert plan.load_weights(half) == ""
    found = exported(halves[0]) | exported(halves[1])
    assert found.keys() == first.keys()
    assert all(torch.equal(found[name], first[name]) for name in first)
    runs = [in_threads.Run(load(values=settings | {"pipeline.stages": stages})).result for stages in (1, 2)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != in_threads.Run(load(values=settings | {"model.weights": ""})).result.losses
