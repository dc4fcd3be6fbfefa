"""What is said of an optimizer before any process starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_dist.launch.preflight import preflight
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.worker import optimizers

OWN = """
import torch

class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr, boost=1.0):
        super().__init__(params, {"lr": lr, "boost": boost})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for one in group["params"]:
                one -= group["lr"] * group["boost"] * one.grad.sign()

class Restless(Sign):
    def step(self, closure):
        closure()

class Odd(Sign):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["kept"] = torch.nn.Linear(1, 1)

def nothing(params, lr):
    return None
"""


@pytest.fixture
def check(tmp_path: Path) -> Any:
    (tmp_path / "own.py").write_text(OWN)

    def run(name: str, **args: object) -> None:
        decays = args.pop("decay_norms", True)
        values = {"optimizer.name": name.replace("own.py", f"{tmp_path}/own.py"), "optimizer.args": args}
        config = load(values=values | {"optimizer.decay_norms": decays})
        optimizers.check(Plan.plan(config, 10, torch.zeros(2, 1, 16, 16)))

    return run


def test_all_of_torch_are_known_by_their_names_in_small_letters() -> None:
    assert {"adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "radam"} <= set(
        optimizers.OPTIMIZERS.names()
    )


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((name, {}) for name in optimizers.OPTIMIZERS.names() if name != "muon"),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay_norms": False}),
        ("adam", {"foreach": True}),
        ("own.py:Sign", {"boost": 2.0}),
    ],
)
def test_what_can_train_passes(name: str, args: dict[str, object], check: Any) -> None:
    check(name, **args)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adamw2", {}, r"optimizer.name = 'adamw2': unknown; use one of adadelta, .*sgd, or your own as"),
        ("lbfgs", {}, r"optimizer.name = 'lbfgs': it asks for the loss several times"),
        ("sparseadam", {}, r"optimizer.name = 'sparseadam': it takes sparse gradients"),
        (
            "sgd",
            {"momentm": 0.9},
            r"optimizer.args = {'momentm': 0.9}: sgd cannot be called .*; sgd takes .*momentum",
        ),
        ("sgd", {"momentum": -1}, r"optimizer.args = {'momentum': -1}: sgd: Invalid momentum value: -1"),
        ("sgd", {"nesterov": True}, r"Nesterov momentum requires a momentum"),
        ("adamw", {"betas": [0.9]}, r"optimizer.args = {'betas': \[0.9\]}: adamw: IndexError: list"),
        ("muon", {}, r"muon: Muon only supports 2D parameters"),
        ("sgd", {"decay_norms": False}, r"optimizer.decay_norms = false: nothing decays with 'sgd'"),
        ("own.py:Restless", {}, r"own.py:Restless': .*TypeError: .*closure"),
        ("own.py:Odd", {}, r"own.py:Odd': no checkpoint could be read"),
        ("own.py:nothing", {}, r"own.py:nothing' gives NoneType"),
        ("own.py:none", {}, r"has no 'none'; it has Odd, Restless, Sign"),
    ],
)
def test_what_cannot_is_named(name: str, args: dict[str, object], message: str, check: Any) -> None:
    with pytest.raises(ValueError, match=message):
        check(name, **args)


def test_the_preflight_looks_at_the_optimizer() -> None:
    with pytest.raises(ValueError, match="Invalid momentum value"):
        preflight(
            load(values={"optimizer.name": "sgd", "optimizer.args": {"momentum": -1}, "metrics.port": 0})
        )
