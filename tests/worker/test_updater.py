from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import load
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.worker.updater import Updater

CONFIG = load()


class Paths(TrainableBlock):
    """A block and a head with an optimizer each; a third group is empty."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 3), {"classifier": nn.Linear(3, 2)})
        self.updates = 0

    def parameter_groups(self) -> list[dict[str, Any]]:
        heads = {"params": list(self.heads.parameters()), "lr_scale": 0.5}
        return [{"params": list(self.block.parameters())}, heads, {"params": []}]

    def updated(self) -> None:
        self.updates += 1


def loss(block: TrainableBlock, number: int) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    return block.heads["classifier"](block(x)).square().mean()  # type: ignore[no-any-return]


def test_updates_are_those_of_an_adam_for_each_group_with_the_scheduled_rate() -> None:
    ours, theirs = Paths(), Paths()
    updater = Updater(ours, CONFIG)
    adams = [torch.optim.Adam(theirs.block.parameters()), torch.optim.Adam(theirs.heads.parameters())]
    for number, lr in enumerate((1e-2, 3e-3)):
        for adam, scale in zip(adams, (1.0, 0.5), strict=True):
            adam.param_groups[0]["lr"] = lr * scale
        for part in (2 * number, 2 * number + 1):  # gradients of micro-batches are added up
            updater.backward(loss(ours, part))
            torch.autograd.backward(loss(theirs, part))
        updater.step({"lr": lr})
        for adam in adams:
            adam.step()
            adam.zero_grad()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)  # the fused kernel rounds otherwise
            assert mine.grad is None
    assert ours.updates == 2


def test_a_state_that_went_through_a_file_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    first, second = Updater(Paths(), CONFIG), Updater(Paths(), CONFIG)
    first.backward(loss(first.trainable, 0))
    first.step({"lr": 1e-2})
    state = first.state_dict()
    assert state.keys() == {"block", "heads", "optimizers"}  # as it has always been: old checkpoints are read
    torch.save(state, tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for updater in (first, second):
        updater.backward(loss(updater.trainable, 1))
        updater.step({"lr": 1e-2})
    assert all(map(torch.equal, first.trainable.parameters(), second.trainable.parameters()))


def test_a_state_of_another_model_is_refused() -> None:
    updater = Updater(Paths(), CONFIG)
    state = updater.state_dict()
    wrongs: list[dict[str, Any]] = [{"optimizers": []}, {"heads": {}}]
    for wrong in wrongs:
        with pytest.raises(CheckpointError, match="belongs to another model"):
            updater.load_state_dict(state | wrong)


def test_what_is_not_finite_in_a_state_is_named_and_an_infinite_buffer_is_not() -> None:
    block = Paths()
    block.block.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    updater = Updater(block, CONFIG)
    assert updater.nonfinite(updater.state_dict()) is None
    updater.backward(loss(block, 0))
    updater.step({"lr": 1e-3})
    assert updater.nonfinite(updater.state_dict()) is None
    moment = next(iter(updater.optimizers[0].state.values()))["exp_avg"]
    for value, name in (
        (block.heads["classifier"].bias, "weight classifier.bias"),
        (block.block.mask, "buffer mask"),
        (moment, "an optimizer's state"),
    ):
        assert isinstance(value, Tensor)
        before = value.detach().clone()
        with torch.no_grad():
            value[0] = torch.nan
            assert updater.nonfinite(updater.state_dict()) == name
            value.copy_(before)
