"""Gradients through everything that travels between blocks: masks, hidden states, whole dictionaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from tests.support.pipelines import run

WORDS = torch.randint(1, 50, (12, 7), generator=torch.Generator().manual_seed(0))
WORDS[3, 4:] = 0
LABELS = torch.arange(12) % 3


def plan(model: str, method: str, parts: int, stages: int, **args: object) -> Plan:
    values: dict[str, object] = {
        "model.name": model,
        "model.args": {"vocabulary": 50, **args},
        "run.method": method,
        "pipeline.micro_batches": parts,
        "pipeline.stages": stages,
    }
    return Plan.plan(load(values=values), 3, WORDS[:2])


def gradients(model: str, method: str, parts: int, stages: int, **args: object) -> list[Tensor]:
    made = plan(model, method, parts, stages, **args)
    trainables = made.trainables(range(len(made.parameters)))
    found = run(made.method, trainables, [spec.blocks for spec in made.specs], WORDS, LABELS, parts)
    return [gradient for block in found.values() for gradient in block]


@pytest.mark.parametrize(
    ("model", "args"), [("lstm_tiny", {}), ("transformer", {"dropout": 0.0, "width": 24})]
)
@pytest.mark.parametrize(("method", "parts"), [("bp", 1), ("gpipe", 3)])
def test_texts_have_the_same_gradients_on_any_number_of_stages(
    model: str, args: dict[str, object], method: str, parts: int
) -> None:
    alone = gradients(model, method, parts, 1, **args)
    for stages in (2, 3):
        assert all(map(torch.equal, alone, gradients(model, method, parts, stages, **args)))


def test_they_are_the_gradients_of_one_graph_through_all_blocks() -> None:
    made = plan("lstm_tiny", "bp", 1, 3)
    trainables = made.trainables(range(3))
    carry: object = WORDS
    for trainable in trainables.values():
        carry = trainable.train()(carry)
    torch.autograd.backward(functional.cross_entropy(trainables[2].predict(carry), LABELS))
    wanted = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for trainable in trainables.values()
        for p in trainable.parameters()
    ]
    for mine, theirs in zip(gradients("lstm_tiny", "bp", 1, 3), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
