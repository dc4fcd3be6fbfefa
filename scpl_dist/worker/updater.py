"""Changes the weights of one block: its optimizers, all between a loss and an update, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, schedule: Mapping[str, float]) -> None:
        """Update with the gradients that are there, and drop them; ``schedule`` has the learning rate "lr"."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule["lr"] * group.get("lr_scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.trainable.updated()

    def state_dict(self) -> dict[str, Any]:
        """Weights, heads and optimizer state; the tensors are those in use, not copies."""
        return {
            "block": self.trainable.block.state_dict(),
            "heads": self.trainable.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def nonfinite(self, state: Mapping[str, Any]) -> str | None:
        return nonfinite(self.trainable, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put such a state back; raises CheckpointError if it belongs to another model."""
        restore(self.trainable, self.optimizers, state)


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
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error
