from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import load
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.worker.optimizers import OPTIMIZERS
from scpl_dist.worker.updater import Updater, restore_answering

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


def test_a_frozen_block_keeps_its_weights_and_nothing_that_learning_needs() -> None:
    updater = Updater(Paths(), load(values={"optimizer.ema": 0.5}))
    updater.train(True)
    updater.backward(loss(updater.trainable, 0))
    updater.step({"lr": 1e-2})
    learning = copy.deepcopy(updater.state_dict())
    updater.backward(loss(updater.trainable, 1))
    updater.freeze()
    own = updater.trainable
    assert own.training
    assert not own.block.training
    assert not own.heads["classifier"].training
    assert not any(one.requires_grad or one.grad is not None for one in own.parameters())
    torch.testing.assert_close(updater.state_dict(), learning | {"optimizers": []}, rtol=0, atol=0)
    for training in (False, True):
        updater.train(training)
        assert own.training is training
        assert not own.block.training


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_block_may_be_frozen_or_learn_again_when_a_run_goes_on(name: str) -> None:
    config = load(values={"optimizer.name": name})
    first, second, third = (Updater(Paths(), config) for _ in range(3))
    first.backward(loss(first.trainable, 0))
    first.step({"lr": 1e-2})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.freeze()
    third.load_state_dict(second.state_dict())
    assert not any(optimizer.state for optimizer in third.optimizers)
    third.backward(loss(third.trainable, 0))
    third.step({"lr": 1e-2})
    assert not torch.equal(third.trainable.block.weight, second.trainable.block.weight)  # type: ignore[arg-type]


ARGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1},
    "rmsprop": {"momentum": 0.9, "centered": True},
}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS.names()) - {"adam", "muon"}))
def test_any_optimizer_of_torch_is_that_of_a_plain_loop_to_the_bit_also_after_a_file(
    name: str, tmp_path: Path
) -> None:
    kind = next(kind for found, kind in vars(torch.optim).items() if found.lower() == name)
    config = load(values={"optimizer.name": name, "optimizer.args": ARGS.get(name, {})})
    ours, theirs = Paths(), Paths()
    updater = Updater(ours, config)
    parts = (theirs.block, theirs.heads)
    plain = [
        kind(part.parameters(), lr=1e-2 * scale, **ARGS.get(name, {}))
        for part, scale in zip(parts, (1, 0.5), strict=True)
    ]
    for number in range(4):
        updater.backward(loss(ours, number))
        updater.step({"lr": 1e-2})
        torch.autograd.backward(loss(theirs, number))
        for optimizer in plain:
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        torch.save(updater.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state.keys() == {"block", "heads", "optimizers"}
        ours = Paths()
        updater = Updater(ours, config)
        updater.load_state_dict(state)
        assert updater.nonfinite(state) is None


def test_norms_and_biases_may_be_left_without_decay() -> None:
    values = {
        "optimizer.name": "sgd",
        "optimizer.args": {"weight_decay": 0.5},
        "optimizer.decay_norms": False,
    }
    updater = Updater(Paths(), load(values=values))
    before = {name: one.detach().clone() for name, one in updater.trainable.named_parameters()}
    for one in updater.trainable.parameters():
        one.grad = torch.zeros_like(one)
    updater.step({"lr": 0.1})
    for name, one in updater.trainable.named_parameters():
        rate = 0.05 if name.startswith("heads") else 0.1  # that group has half the rate
        wanted = before[name] if name.endswith("bias") else before[name] * (1 - 0.5 * rate)
        torch.testing.assert_close(one, wanted)


def test_a_run_that_goes_on_has_the_settings_of_its_configuration() -> None:
    first, second = (
        Updater(Paths(), load(values={"optimizer.name": "sgd", "optimizer.args": {"momentum": momentum}}))
        for momentum in (0.9, 0.5)
    )
    first.backward(loss(first.trainable, 0))
    first.step({"lr": 0.1})
    second.load_state_dict(first.state_dict())
    assert [group["momentum"] for one in second.optimizers for group in one.param_groups] == [0.5, 0.5]
    assert [len(one.state) for one in second.optimizers] == [2, 2]


def test_gradients_are_clipped_at_the_update_by_the_length_of_the_block_or_by_one_that_is_given() -> None:
    values: dict[str, Any] = {"optimizer.name": "sgd"}
    for key, given in (
        ("optimizer.clip_norm", None),
        ("optimizer.clip_norm", 0.7),
        ("optimizer.clip_value", None),
    ):
        ours, theirs = Paths(), Paths()
        updater = Updater(ours, load(values=values | {key: 1e-2}))
        for number in range(2):
            updater.backward(loss(ours, number))
            torch.autograd.backward(loss(theirs, number))
        everything = list(theirs.parameters())
        if key == "optimizer.clip_value":
            torch.nn.utils.clip_grad_value_(everything, 1e-2)
        elif given is None:
            assert torch.nn.utils.clip_grad_norm_(everything, 1e-2) == updater.norm() > 1e-2
        else:
            torch.nn.utils.clip_grads_with_norm_(everything, 1e-2, torch.tensor(given))
        torch.optim.SGD(theirs.block.parameters(), lr=0.1).step()
        torch.optim.SGD(theirs.heads.parameters(), lr=0.05).step()
        updater.step({"lr": 0.1}, None if given is None else torch.tensor(given))
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_gradients_that_wait_for_their_update_are_saved_with_the_rest(tmp_path: Path) -> None:
    first, second = Updater(Paths(), CONFIG), Updater(Paths(), CONFIG)
    first.backward(loss(first.trainable, 0))
    state = first.state_dict()
    torch.save(state, tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for updater in (first, second):
        updater.backward(loss(updater.trainable, 1))
        updater.step({"lr": 1e-2})
        assert updater.state_dict().keys() == {"block", "heads", "optimizers"}
    assert all(map(torch.equal, first.trainable.parameters(), second.trainable.parameters()))
    state["gradients"]["block.bias"][0] = torch.nan
    assert first.nonfinite(state) == "a gradient"


def test_the_moving_average_is_that_of_torch_and_answers_while_the_weights_learn_on(tmp_path: Path) -> None:
    config = load(values={"optimizer.ema": 0.75})
    updater, plain = Updater(Paths(), config), Updater(Paths(), CONFIG)
    average = AveragedModel(plain.trainable, multi_avg_fn=get_ema_multi_avg_fn(0.75))  # type: ignore[no-untyped-call]
    updater.train(False)  # before the first update the weights themselves answer
    for number in range(3):
        for one in (updater, plain):
            one.train(True)
            one.backward(loss(one.trainable, number))
            one.step({"lr": 1e-2})
        average.update_parameters(plain.trainable)
        assert all(map(torch.equal, updater.trainable.parameters(), plain.trainable.parameters()))
        updater.train(False)
        updater.train(False)
        assert all(map(torch.equal, updater.trainable.parameters(), average.module.parameters()))
        updater.train(True)
        torch.save(updater.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        updater = Updater(Paths(), config)
        updater.load_state_dict(state)
    elsewhere = Updater(Paths().to("meta"), config)
    with warnings.catch_warnings(action="ignore"):  # there are no values there
        elsewhere.load_state_dict(state)  # a copy on the host, for a block on a device
    assert {one.device.type for one in elsewhere.tensors()} == {"meta"}
    answering = Paths()
    restore_answering(answering, state | {"optimizers": []})
    assert all(map(torch.equal, answering.parameters(), average.module.parameters()))


def test_a_state_of_another_model_is_refused() -> None:
    updater = Updater(Paths(), CONFIG)
    state = updater.state_dict()
    wrongs: list[dict[str, Any]] = [{"optimizers": state["optimizers"][:1]}, {"heads": {}}]
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


def test_gradients_of_a_scaled_loss_are_scaled_back_before_they_are_clipped() -> None:
    """Two batches for an update; the second update overflows, and is left out."""
    ours, theirs = Paths(), Paths()
    updater = Updater(ours, load(None, ["runtime.precision=float16", "optimizer.clip_norm=0.01"]))
    adams = [torch.optim.Adam(theirs.block.parameters()), torch.optim.Adam(theirs.heads.parameters())]
    scaler = torch.amp.GradScaler("cpu")
    for number, factor in enumerate((1.0, 1e36, 1.0)):
        for part in (2 * number, 2 * number + 1):
            updater.backward(loss(ours, part) * factor)
            torch.autograd.backward(scaler.scale(loss(theirs, part) * factor))
        state = updater.state_dict()
        assert state["gradients"].keys() == {name for name, _ in ours.named_parameters()}
        assert updater.nonfinite(state) is None, "an update that will be left out harms no checkpoint"
        updater.step({"lr": 1e-2})
        for adam in adams:
            adam.param_groups[0]["lr"] = 1e-2 if adam is adams[0] else 5e-3
            scaler.unscale_(adam)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        for adam in adams:
            scaler.step(adam)
            adam.zero_grad()
        scaler.update()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
