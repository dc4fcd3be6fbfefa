"""Changes the weights of one block: its optimizers, all between a loss and an update, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.methods.arithmetic import on_gpu
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import Config
from scpl_dist.storage.checkpoints import CheckpointError


class Updater:
    """An Adam for each parameter group of a block (betas 0.9 and 0.999, eps 1e-8, no weight decay), as published.

    The fused kernel updates all parameters of a group in one pass over memory; the update is Adam's all the same.
    """

    def __init__(self, trainable: TrainableBlock, config: Config) -> None:
        self.trainable = trainable
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam([group], lr=config.optimizer.lr, fused=True)
            for group in trainable.parameter_groups()
            if group["params"]
        ]
        # The gradients of a loss are below what float16 can hold: it is scaled up, and they are scaled back.
        self.scaler: torch.amp.GradScaler | None = None
        if config.runtime.precision == "float16" and self.optimizers:
            self.scaler = torch.amp.GradScaler("cuda" if on_gpu(config) else "cpu")

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def step(self, schedule: Mapping[str, float]) -> None:
        """Update with the gradients that are there, and drop them; ``schedule`` has the learning rate "lr".

        If they were scaled, and too large for it, nothing changes but the scale, which is halved.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule["lr"] * group.get("lr_scale", 1.0)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.unscale_(optimizer)
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
        self.trainable.updated()

    def state_dict(self) -> dict[str, Any]:
        """Weights, heads and optimizer state; the tensors are those in use, not copies."""
        state = {
            "block": self.trainable.block.state_dict(),
            "heads": self.trainable.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        return state if self.scaler is None else state | {"scaler": self.scaler.state_dict()}

    def nonfinite(self, state: Mapping[str, Any]) -> str | None:
        return nonfinite(self.trainable, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put such a state back; raises CheckpointError if it belongs to another model."""
        restore(self.trainable, self.optimizers, state)
        if (
            self.scaler is not None and "scaler" in state
        ):  # not if the run was in another precision until here
            self.scaler.load_state_dict(state["scaler"])


def nonfinite(trainable: TrainableBlock, state: Mapping[str, Any]) -> str | None:
    """What in such a state is NaN or infinite, such as "weight 0.bias"; a buffer may be infinite, as masks are."""
    for part, module in (("block", trainable.block), ("heads", trainable.heads)):
        weights = {name for name, _ in module.named_parameters()}
        for name, value in state[part].items():
            if name in weights and not value.isfinite().all():
                return f"weight {name}"
            if isinstance(value, Tensor) and value.isnan().any():
                return f"buffer {name}"
    leaves = pytree.tree_leaves(state["optimizers"])
    finite = all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor))
    return None if finite else "an optimizer's state"


def restore(
    trainable: TrainableBlock, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """`Updater.load_state_dict` for a block that may have no optimizers."""
    try:
        trainable.block.load_state_dict(state["block"])
        trainable.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            _order_like_parameters(optimizer)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error


def _order_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels go through memory as it lies, and a checkpoint may be of the other ``runtime.memory_format``."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
