"""Narrow wires between the stages of a run in one process: what they round, and what they must not hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.run.config import load
from scpl_dist.run.errors import NonFinite
from tests.support import in_threads, reference

SETTINGS = ["run.epochs=1", "data.batch_size=256", "data.augmentation=none", "pipeline.stages=3"]


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "settings",
    [
        ["run.method=scpl", "pipeline.micro_batches=2", f"model.name={__name__}:plain"],
        ["run.method=bp", f"model.name={__name__}:plain"],
        ["run.method=gpipe", "pipeline.micro_batches=2", f"model.name={__name__}:plain"],
        ["run.method=al", "al.code=16", f"model.name={__name__}:plain"],
    ],
    ids=["scpl", "bp", "gpipe", "al"],
)
def test_a_run_equals_the_plain_loop_that_rounds_where_stages_meet(settings: list[str], wire: str) -> None:
    config = load(None, [*SETTINGS, *settings, f"pipeline.wire_dtype={wire}"])
    found, expected = in_threads.Run(config).result, reference.train(config)
    assert found.losses == expected.losses
    assert found.accuracy == expected.accuracy


def plain(classes: int) -> list[nn.Module]:
    first = nn.Sequential(nn.Flatten(), nn.Linear(256, 96), nn.ReLU())
    return [first, *(nn.Sequential(nn.Linear(96, 96), nn.ReLU()) for _ in range(3))]


class Leaking(nn.Module):
    """Its own loss sees nothing of what it hands on beside, which is not finite at its fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 64)
        self.steps = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += self.training
        seen = self.layer(x.flatten(1))
        beside = torch.ones_like(seen)
        if self.steps == 4:
            beside[0, 3] = torch.inf
        return seen, beside

    def feature(self, after: tuple[Tensor, Tensor]) -> Tensor:
        return after[0]


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, carry: tuple[Tensor, Tensor]) -> Tensor:
        added: Tensor = self.layer(carry[0] + carry[1])
        return added


def leaking(classes: int) -> list[nn.Module]:
    return [Leaking(), Adding()]


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_ends_the_run_with_its_step_whatever_the_wire(wire: str) -> None:
    settings = ["pipeline.stages=2", f"model.name={__name__}:leaking", f"pipeline.wire_dtype={wire}"]
    with pytest.raises(NonFinite, match="of block 1 is nan") as caught:
        in_threads.Run(load(None, [*SETTINGS, *settings]))
    assert caught.value.step == 3
