"""The training thread never asks its device for a number, and a loss that is not finite is heard of in time.

What stands for a device is torch's "meta": its tensors have no values, so whatever asks for one raises.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from scpl_dist import transport
from scpl_dist.control.messages import Done
from scpl_dist.run.config import load
from scpl_dist.run.errors import NonFinite
from scpl_dist.transport import Envelope
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker import losses
from scpl_dist.worker.losses import Losses
from scpl_dist.worker.updater import Updater
from tests.support import in_threads, reference
from tests.support.reference import Reference
from tests.worker.test_updater import Paths, loss

PICTURES = [f"data.name={__name__}:pictures", "data.augmentation=none", "data.batch_size=16", "run.epochs=2"]
TEXTS = [
    "task.name=lm",
    "run.watch=perplexity",
    "data.name=text_lm",
    "data.args={length=16, limit=4000}",
    "model.name=gpt",
    "model.args={width=16, layers=2, heads=2, blocks=2}",
    "data.batch_size=48",
    "run.epochs=1",
]
METHODS: dict[str, list[str]] = {
    "scpl": [*PICTURES, "optimizer.clip_norm=1.0", "optimizer.ema=0.9", "optimizer.accumulate=2"],
    "early_exit": [*PICTURES, "run.method=early_exit", "pipeline.micro_batches=2", "optimizer.name=sgd"],
    "predsim": [*PICTURES, "loss.name=predsim", "optimizer.clip_value=0.1", "optimizer.name=adamw"],
    "deinforeg": [*PICTURES, "loss.name=deinforeg", "optimizer.name=rmsprop"],
    "al": [*PICTURES, "run.method=al", "al.autoencoder_lr=2.0"],
    "bp": [*PICTURES, "run.method=bp", "optimizer.clip_norm=1.0"],
    "gpipe": [
        *PICTURES,
        "run.method=gpipe",
        "pipeline.micro_batches=3",
        "pipeline.deferred_batch_norm=true",
        "pipeline.recompute=true",
    ],
    "lm": [*TEXTS, "run.method=gpipe", "pipeline.micro_batches=3", "optimizer.clip_norm=1.0"],
    "lm, contrastive": [*TEXTS, "optimizer.ema=0.9"],
    "lm, halves": [*TEXTS, "task.compared=halves"],
}


def pictures(root: str) -> list[TensorDataset]:
    return _pictures(())


def spoilt(root: str) -> list[TensorDataset]:
    """One picture of an epoch's third batch is NaN: the order of the pictures is drawn, this was looked up."""
    return _pictures((3,))


def _pictures(spoilt: tuple[int, ...]) -> list[TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    sets = [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in (70, 20, 20)
    ]
    for index in spoilt:
        sets[0][0][index] = torch.nan
    return [TensorDataset(*one) for one in sets]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder "data"


@pytest.mark.parametrize("method", METHODS)
def test_training_asks_the_device_for_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []

    def to_host(values: Tensor) -> Tensor:
        assert values.is_meta
        copied.append(values)
        return torch.zeros(values.shape)

    monkeypatch.setattr(losses, "to_host", to_host)
    optimizer = importlib.import_module("torch.optim.optimizer")
    fused = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, fused.__name__, lambda: [*fused(), "meta"])
    run = in_threads.Run(load(None, [*METHODS[method], "pipeline.stages=2"]), device="meta")
    assert copied
    assert len({step for step, _ in run.result.losses}) > losses.DELAY
    assert all(one.is_meta for own in run.result.trainables.values() for one in own.parameters())


ASKS: list[Callable[[Tensor], Any]] = [
    Tensor.item,
    Tensor.tolist,
    bool,
    float,
    torch.nonzero,
    Tensor.cpu,
    Tensor.numpy,
    lambda tensor: torch.arange(3)[tensor > 0],
    lambda tensor: torch.empty(3).copy_(tensor),
]


@pytest.mark.parametrize("ask", ASKS)
def test_what_stands_for_the_device_answers_nothing(ask: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        ask(torch.zeros(3 if ask in ASKS[-2:] else 1, device="meta"))


@pytest.mark.parametrize("method", ["scpl", "early_exit", "deinforeg", "al", "gpipe", "lm"])
def test_when_losses_are_read_changes_nothing(method: str) -> None:
    at_once, later = (
        in_threads.Run(load(None, [*METHODS[method], "pipeline.stages=2"]), delay=delay).result
        for delay in (0, 2)
    )
    assert later.losses == at_once.losses
    assert later.metrics == at_once.metrics
    wanted = reference.tensors(at_once.trainables)
    for name, tensor in reference.tensors(later.trainables).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("method", ["scpl", "predsim", "al", "bp", "gpipe"])
def test_a_loss_that_is_not_finite_never_reaches_the_weights_however_late_it_is_read(
    method: str, stages: int
) -> None:
    settings = [*METHODS[method], f"data.name={__name__}:spoilt", f"pipeline.stages={stages}"]
    ends: list[tuple[int | None, int | None, Reference, dict[int, list[int]]]] = []
    for delay in (0, 3):
        result, reported = Reference(), dict[int, list[int]]()
        with pytest.raises(NonFinite, match=r"block . is nan: .* the update was not made") as raised:
            in_threads.Run(load(None, settings), delay=delay, result=result, reported=reported)
        ends.append((raised.value.step, raised.value.micro_batch, result, reported))
    (step, micro_batch, first, _), (*later_at, later, reported) = ends
    assert later_at == [step, micro_batch]
    assert step is not None
    assert step > 0
    # With local losses the stages after the first one are wherever they were when it stopped.
    blocks = first.trainables if method in ("bp", "gpipe") or stages == 1 else range(2)
    for block in blocks:
        for mine, other in zip(
            later.trainables[block].parameters(), first.trainables[block].parameters(), strict=True
        ):
            assert other.isfinite().all()
            assert torch.equal(mine, other)
    assert reported.get(0, []) == list(range(len(reported.get(0, []))))
    assert all(found < step for found, block in later.losses if block in blocks)


@pytest.mark.parametrize("spoils", [True, False])
def test_nothing_is_saved_or_answers_behind_a_loss_that_is_not_read_yet(spoils: bool, tmp_path: Path) -> None:
    """A checkpoint follows each step at once, and an evaluation the last one."""
    name = "spoilt" if spoils else "pictures"
    settings = [*PICTURES, f"data.name={__name__}:{name}", "data.batch_size=24", "run.epochs=1"]
    config = load(None, [*settings, "checkpoint.every_steps=1", "pipeline.stages=1"])
    reported = dict[int, list[int]]()
    with pytest.raises(NonFinite) if spoils else nullcontext():
        in_threads.Run(config, delay=3, reported=reported, run_dir=tmp_path)
    saved = {int(path.parent.name.split("-")[1].split(".")[0]) for path in tmp_path.rglob("block-*")}
    assert saved == ({1} if spoils else {1, 2, 3})  # steps done: the spoilt one is the second
    assert len(reported[0]) == 2 if spoils else len(reported[0]) > 7


def test_gradients_that_go_back_say_that_no_update_must_be_made_though_they_are_finite() -> None:
    """Their loss is infinite at a place where it is flat."""
    behind, before = (Losses(torch.device("cpu"), 2) for _ in range(2))
    done, gradients = Done(sequence=0), [torch.ones(3, 2), torch.ones(1)]
    assert before.spoilt is not None
    behind.note(4, 1, 3, ("local", "other"), torch.tensor([1.0, 2.0]), 0.5)
    assert all(map(torch.equal, behind.mark(gradients), gradients))
    before.note_mark(4, 1, 2, behind.mark(gradients))
    assert before.spoilt.item() == 0
    behind.note(5, 1, 3, ("local", "other"), torch.tensor([torch.inf, 2.0]), 0.5)
    behind.note(6, 0, 3, ("local", "other"), torch.tensor([1.0, 2.0]), 1.0)
    before.note_mark(5, 1, 2, behind.mark(gradients))
    assert before.spoilt.item() == 1
    for losses_of, text in (
        (behind, "loss 'local' of block 3 is inf"),
        (before, "the gradient that came back to block 2 is nan"),
    ):
        losses_of.put(done)
        assert not list(losses_of.read())
        with pytest.raises(NonFinite, match=text) as raised:
            list(losses_of.read(at_once=True))
        assert (raised.value.step, raised.value.micro_batch) == (5, 1)


def test_what_a_gpu_was_given_to_read_lives_until_it_has_done_the_item(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its memory belongs to another stream, which would fill it again at once."""
    gpu, events = torch.device("cuda"), [Mock(), Mock()]
    stream = Mock(record_event=Mock(side_effect=events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(transport, "to_device", lambda payload, device: payload)
    lane = RpcTransport(rank=1, world=2, max_in_flight=2, device=gpu, generation="1", devices=[gpu] * 2)
    payload = torch.ones(3).bfloat16()
    alive = weakref.ref(payload)
    lane.arrive(0, 0, Envelope({}, 0, payload, wide=[(0, "float32")]), lambda: None)
    del payload
    received = lane.receive(0).payload
    assert torch.equal(received, torch.ones(3))
    stream.wait_event.assert_called_once_with(events[0])
    losses_of = Losses(gpu, 0)
    losses_of.put(Done(sequence=0), lane.lent())
    assert lane.lent() == []
    found: list[bool] = []
    events[1].synchronize.side_effect = lambda: found.append(alive() is not None)
    assert [done.sequence for done in losses_of.read()] == [0]
    assert found == [True]
    assert alive() is None


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_gradients_that_are_scaled_are_guarded_without_a_question(bad: float) -> None:
    """Of those, torch's own scaler asks the device before optimizers without a fused kernel: adam has one."""
    settings = ["runtime.precision=float16", "optimizer.clip_norm=0.01", "optimizer.ema=0.5"]
    updater, plain = (Updater(Paths(), load(None, settings)) for _ in range(2))
    for number in range(3):
        for one in (updater, plain):
            one.backward(loss(one.trainable, number))
        plain.step({"lr": 1e-2})
        with Counting() as mode:
            updater.step({"lr": 1e-2}, None, torch.tensor(bad))
        assert mode.asked == 0
    same = [
        torch.equal(*pair)
        for pair in zip(updater.trainable.parameters(), plain.trainable.parameters(), strict=True)
    ]
    assert all(same) if bad == 0 else not any(same)
    if bad:
        assert all(map(torch.equal, updater.trainable.parameters(), Paths().parameters()))
