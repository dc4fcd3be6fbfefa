"""Batches of SCPL that are split: each part's activations alone, the loss and the gradient of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.data.sampling import permutation
from scpl_dist.methods import arithmetic, resolve
from scpl_dist.methods.block import TrainableBlock, seed_operators
from scpl_dist.methods.task import Classification
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from tests.support.pipelines import run

WIDTH, CLASSES, SAMPLES, BLOCKS = 12, 5, 50, 3
OBJECTIVES = ["supcon", "predsim", "deinforeg", f"{__name__}:spread"]


def spread(features: Tensor, labels: Tensor) -> Tensor:
    """An objective of the user's that compares samples."""
    return -features.var(0).mean()


class Counting(nn.Module):
    """Counts the samples that it has seen in training, and drops half of what they have."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(share)
        self.samples = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.samples.add_(len(x))
        dropped: Tensor = self.dropout(x)
        return dropped


def blocks(share: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(1)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Counting(share), nn.Linear(WIDTH, WIDTH))
        for _ in range(BLOCKS)
    ]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(SAMPLES, WIDTH), torch.randint(CLASSES, (SAMPLES,))


def step(
    parts: int, stages: int = 1, share: float = 0.0, **values: Any
) -> tuple[dict[int, TrainableBlock], dict[int, list[Tensor]]]:
    """The blocks after one step of the executor that changes no weight, and the gradients by block."""
    config = load(values={"pipeline.micro_batches": parts, "loss.projector": "m,16,8"} | values)
    method = resolve("scpl")(config, BLOCKS, Classification(CLASSES))
    shape = torch.empty(2, WIDTH, device="meta")
    made = blocks(share)
    trainables = {k: method.trainable(k, block, shape, shape) for k, block in enumerate(made)}
    for own in trainables.values():
        arithmetic.arrange(own, config, local=True)
    held = [range(1), range(1, BLOCKS)] if stages == 2 else [range(BLOCKS)]
    return trainables, run(method, trainables, held, *batch(), parts)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parts", [2, 7])
def test_gradients_are_those_of_the_whole_batch(objective: str, parts: int) -> None:
    values: dict[str, Any] = {"loss.name": objective, "loss.local_predictors": True}
    _, wanted = step(1, **values)
    for stages in (1, 2):
        _, found = step(parts, stages, **values)
        for block in range(BLOCKS):
            for mine, whole in zip(found[block], wanted[block], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)
                assert whole.any()


def test_the_number_of_stages_and_recomputation_inside_a_block_change_no_bit() -> None:
    _, wanted = step(4)
    for stages, recompute in ((2, False), (1, True)):
        _, found = step(4, stages, **{"pipeline.recompute": recompute})
        assert all(torch.equal(a, b) for k in wanted for a, b in zip(found[k], wanted[k], strict=True))


def test_dropout_is_drawn_once_and_statistics_see_each_sample_once() -> None:
    trainables, found = step(4, share=0.5)
    counted = {int(own.block[2].samples) for own in trainables.values()}  # type: ignore[index]
    assert counted == {SAMPLES}
    # The same with the graphs of all parts kept: nothing is drawn a second time there.
    order = permutation(0, 0, SAMPLES)  # in which the loader gives the samples
    x, y = (tensor[order] for tensor in batch())
    carries = list(x.tensor_split([12, 25, 37]))
    for k, own in trainables.items():
        seen = []
        for m, carry in enumerate(carries):
            seed_operators(0, k, 0, m)
            after = own(carry)
            seen.append(own.embed(carry, after))
            carries[m] = after.detach()
        together = {name: torch.cat([part[name] for part in seen]) for name in seen[0]}
        torch.stack(list(own.loss_terms(together, y).values())).sum().backward()  # type: ignore[no-untyped-call]
        for mine, parameter in zip(found[k], own.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-7)


def test_class_weights_may_be_split_since_the_mean_is_over_all() -> None:
    values: dict[str, Any] = {"task.class_weights": [1.0, 2.0, 3.0, 4.0, 5.0]}
    config = load(values=values | {"pipeline.micro_batches": 4})
    resolve("scpl")(config, BLOCKS, Classification(CLASSES, config.task))
    with pytest.raises(ValueError, match="class_weights"):
        resolve("early_exit")(config, BLOCKS, Classification(CLASSES, config.task))


def test_what_would_not_be_the_loss_of_the_whole_batch_is_refused() -> None:
    image = torch.empty(2, 1, 16, 16, device="meta")
    for values, problem in (
        ({}, r"pipeline.micro_batches = 4: block.* of block 0 is a BatchNorm2d, which .* = 1, or GroupNorm"),
        ({"runtime.compile": True}, r"runtime.compile = true and pipeline.micro_batches = 4: scpl computes"),
        (
            {"model.name": f"{__name__}:blocks_of", "loss.projector": "mb"},
            r"heads.projector.layers.2 of block 0 is a BatchNorm1d",
        ),
        (
            {"model.name": f"{__name__}:overwriting"},
            r"block 1 \(ReLU\) changes the tensor that it is given, so that it cannot be computed again",
        ),
    ):
        config = load(values={"pipeline.micro_batches": 4} | values)
        with pytest.raises(ValueError, match=problem):
            Plan.plan(config, CLASSES, image).check()
    Plan.plan(load(None, ["run.method=early_exit", "pipeline.micro_batches=4"]), CLASSES, image).check()


def blocks_of(classes: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Conv2d(2, 2, 3)]


def overwriting(classes: int) -> list[nn.Module]:
    return [nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)]
