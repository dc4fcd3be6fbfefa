"""What a checkpoint holds of one block: weights, heads and optimizer state, taken out and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.storage.checkpoints import CheckpointError


def state_of(trainable: TrainableBlock, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights, heads and optimizer state of one block; the tensors are those in use, not copies."""
    return {
        "block": trainable.block.state_dict(),
        "heads": trainable.heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }


def restore(
    trainable: TrainableBlock, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Put a block's state back; raises CheckpointError if it belongs to another model."""
    try:
        trainable.block.load_state_dict(state["block"])
        trainable.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error
