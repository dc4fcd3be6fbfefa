"""Methods by name: built in, installed, or the user's own; and their settings."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.launch.preflight import preflight
from scpl_dist.methods import resolve
from scpl_dist.methods.scpl import Scpl
from scpl_dist.methods.task import Classification
from scpl_dist.plan.plan import Plan
from scpl_dist.run import registry
from scpl_dist.run.config import load
from tests.support.pipelines import run

OWN = """
from typing import Literal
from scpl_dist.methods import Method
from scpl_dist.methods.base import forward
from scpl_dist.methods.schedule import Action, Kind
from scpl_dist.methods.scpl import Scpl
from scpl_dist.run.config import Section

class Skipping(Scpl):
    "SCPL whose blocks below `first` are left as they are."
    name = "skipping"

    class Settings(Section):
        first: int = 0

    def train(self, spec, micro_batches):
        for action in super().train(spec, micro_batches):
            if action.kind is not Kind.STEP or action.block >= self.settings.first:
                yield action

class Stuck(Scpl):
    name = "stuck"

    def train(self, spec, micro_batches):
        yield from super().train(spec, micro_batches)
        if spec.first:
            yield Action(Kind.RECV_B, micro_batch=0)

class Unfinished(Method):
    name = "unfinished"

def function(config, num_blocks, task):
    return None
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own_method.py"
    file.write_text(OWN)
    return str(file)


def settings(method: str, **values: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return {"run.method": method, "metrics.port": 0, **named}


def test_a_method_of_ones_own_trains_with_its_settings(own: str) -> None:
    config = load(values=settings(f"{own}:Skipping", run__args={"first": 2}))
    x, y = torch.randn(16, 1, 16, 16), torch.arange(16) % 10
    plan = Plan.plan(config, 10, x[:2])
    plan.check()
    gradients = run(plan.method, plan.trainables(range(4)), [range(2), range(2, 4)], x, y)
    assert [block for block, found in gradients.items() if found] == [2, 3]


def test_a_method_is_found_by_entry_point(tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("skipping", "own_method:Skipping", "scpl_dist.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert issubclass(resolve("skipping"), Scpl)
    with pytest.raises(
        ValueError, match=r"use one of scpl, bp, early_exit, gpipe, al, skipping, or your own"
    ):
        resolve("skiping")


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        (":Unfinished", {}, r"run\.method = '.*:Unfinished': the class needs train, trainable"),
        (":function", {}, r"run\.method = '.*:function': give a subclass of scpl_dist\.methods\.Method"),
        (":Missing", {}, r"has no 'Missing'; it has .*Skipping"),
        (":Stuck", {}, r"run\.method = '.*:Stuck': its schedule cannot run: deadlock: stage 0 at RECV_B\.0"),
        (":Skipping", {"run__args": {"last": 1}}, r"run\.args\.last = 1: .*; skipping takes first"),
        (
            ":Skipping",
            {"run__args": {"first": "2"}},
            r"run\.args\.first = '2': input should be a valid integer",
        ),
        ("scpl", {"run__args": {"first": 2}}, r"run\.args\.first = 2: .*; scpl takes no arguments"),
    ],
)
def test_what_a_method_of_ones_own_lacks_is_said_before_anything_starts(
    own: str, name: str, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        preflight(load(values=settings(own + name if name[0] == ":" else name, **values)))


def trained(parts: int = 1, **loss: Any) -> list[Tensor]:
    """Gradients of a step of two blocks on one stage."""
    values = {f"loss.{key}": value for key, value in loss.items() if key != "method"}
    values |= {"run.method": loss.get("method", "scpl"), "pipeline.micro_batches": parts}
    config = load(values=values)
    method = resolve(config.run.method)(config, 2, Classification(3))
    torch.manual_seed(0)
    shape = torch.empty(2, 6, device="meta")
    trainables = {k: method.trainable(k, nn.Linear(6, 6), shape, shape) for k in range(2)}
    found = run(method, trainables, [range(2)], torch.randn(14, 6), torch.arange(14) % 3, parts)
    return [gradient for block in found.values() for gradient in block]


def test_early_exit_is_scpl_with_a_local_classifier() -> None:
    preset, plain = trained(method="early_exit", name="predsim"), trained(name="ce")
    assert len(preset) == len(plain) > 4
    assert all(map(torch.equal, preset, plain))


@pytest.mark.parametrize("name", ["ce", "supcon", "predsim", "deinforeg"])
def test_scpl_may_split_a_batch_though_its_objective_compares_all_samples(name: str) -> None:
    for whole, parts in zip(trained(name=name), trained(3, name=name), strict=True):
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
