"""Optimizers by name: those of torch.optim, installed ones, and the user's own.

adam          with torch's fused kernel, which passes over memory once, as this project has always trained
adamw, sgd    and all others of torch.optim: computed as the class itself chooses, so that a run equals a plain loop
              with it to the bit; ``optimizer.args.fused = true`` is the user's choice
your own      ``package.module:Class``, ``file.py:Class``, or the name of an entry point in the group
              ``scpl_dist.optimizers``, called as ``Class(parameters, lr=..., **args)``
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.run.imports import bind, blaming
from scpl_dist.run.registry import Registry

_UNUSABLE = {
    "lbfgs": "it asks for the loss several times in a step, and a stage has long passed its output on",
    "sparseadam": "it takes sparse gradients, and those of a stage's losses are dense",
}
OPTIMIZERS = Registry(
    "optimizers",
    "optimizer.name",
    {
        name.lower(): f"torch.optim:{name}"
        for name, kind in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
        if isinstance(kind, type)
        and issubclass(kind, Optimizer)
        and kind is not Optimizer
        and name.lower() not in _UNUSABLE
    },
)
_KERNELS = {"fused", "foreach", "differentiable"}  # arguments that choose how adam is computed


def make(settings: config.Optimizer, groups: list[dict[str, Any]]) -> list[Optimizer]:
    """An optimizer for each parameter group that has any; ValueError for a name or arguments that cannot be."""
    if settings.name in _UNUSABLE:
        raise ValueError(f"optimizer.name = {settings.name!r}: {_UNUSABLE[settings.name]}; use another one")
    kernel = {"fused": True} if settings.name == "adam" and not _KERNELS & settings.args.keys() else {}
    found = partial(OPTIMIZERS.find(settings.name), lr=settings.lr, **kernel)
    made = bind(found, "optimizer.args", settings.args, [], name=settings.name)
    optimizers = [made(list(_split(group, settings.decay_norms))) for group in groups if group["params"]]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizer.name = {settings.name!r} gives {type(optimizer).__name__}; give a subclass of "
                "torch.optim.Optimizer, or a function that makes one"
            )
    return optimizers


def _split(group: dict[str, Any], decay_norms: bool) -> Iterator[dict[str, Any]]:
    """The group as it is, or as one that decays and one that does not."""
    if decay_norms:
        yield group
        return
    for flat in (False, True):
        parameters = [parameter for parameter in group["params"] if (parameter.ndim <= 1) is flat]
        if parameters:
            yield group | {"params": parameters} | ({"weight_decay": 0.0} if flat else {})


def check(plan: Plan) -> None:
    """Find what is wrong with the optimizer before any process starts; ValueError with the key and the fix.

    Optimizers are made for all blocks, as meta tensors; one takes a step, and its state goes through a file.
    """
    settings = plan.config.optimizer
    if settings.name == "adam" and not settings.args and settings.decay_norms:
        return  # cannot be wrong, and the first optimizer of a process imports for seconds
    torchs = settings.name in OPTIMIZERS.builtin  # its lines are nothing to mend, whatever it raises
    try:
        with nullcontext() if torchs else blaming("optimizer.name", settings.name):
            made = [one for block in plan.imagined for one in make(settings, block.parameter_groups())]
            _rehearse(settings)
    except Exception as error:
        if str(error).startswith("optimizer."):
            raise
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"optimizer.args = {settings.args}: {settings.name}: {what}") from None
    decays = (group.get("weight_decay", 0) for optimizer in made for group in optimizer.param_groups)
    if not settings.decay_norms and not any(decays):
        raise ValueError(
            f"optimizer.decay_norms = false: nothing decays with {settings.name!r} and optimizer.args = "
            f"{settings.args}; set optimizer.args.weight_decay, or leave it out"
        )


def _rehearse(settings: config.Optimizer) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    [optimizer] = make(settings, [{"params": [parameter]}])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"optimizer.name = {settings.name!r}: no checkpoint could be read, because of its state: keep tensors, "
            f"numbers, texts, lists and dicts in it ({str(error).splitlines()[0]})"
        ) from None
