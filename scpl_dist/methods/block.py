"""One block and everything that trains together with it.

The executor moves a *carry* (a pytree of tensors, batch first) from block to block. Most methods carry activations
only; a method with a second stream, such as associated learning, carries both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scpl_dist.methods.heads import feature
from scpl_dist.run import seeds

Carry = Any  # a pytree of tensors, batch dimension first


class TrainableBlock(nn.Module):
    """A block of the model, and by name the heads that its objective adds; ``predictor`` is kept for inference."""

    def __init__(self, block: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.block = block
        self.heads = nn.ModuleDict(heads)

    def forward(self, carry: Carry) -> Carry:
        """Output of the block, which is the carry of the next one."""
        return self.block(carry)

    def embed(self, before: Carry, after: Carry) -> Any:
        """What the objective sees of the samples: a pytree of tensors (N, ...), each row from its own sample alone.

        `before` is what the block was given, `after` what `forward` made of it, still joined to it by autograd.
        """
        raise NotImplementedError(f"{type(self).__name__} has no objective of its own")

    def loss_terms(self, seen: Any, labels: Tensor) -> dict[str, Tensor]:
        """Terms of the objective, scalars; their sum is minimised. Without parameters: those are used in `embed`.

        `seen` is what `embed` gave of all samples of the micro-batch, also those of other replicas; their labels are
        int64, sample first; see `scpl_dist.methods.task` for their shape.
        """
        raise NotImplementedError(f"{type(self).__name__} has no objective of its own")

    def losses(self, before: Carry, after: Carry, labels: Tensor) -> dict[str, Tensor]:
        """`loss_terms` where one block has the whole micro-batch."""
        return self.loss_terms(self.embed(before, after), labels)

    def predict(self, after: Carry) -> Tensor:
        """The answer of this block from its output: scores of its predictor, or a code that `decode` turns back."""
        scores: Tensor = self.heads["predictor"](feature(self.block, after))
        return scores

    def decode(self, answer: Tensor) -> Tensor:
        """The answer in terms of the block before, (N, ...)."""
        raise NotImplementedError(f"{type(self).__name__} decodes nothing")

    def local_scores(self, after: Carry) -> Tensor | None:
        """Scores (N, ..., classes) of a local head, which a sample may leave with; None if there is none."""
        return None

    def updated(self) -> None:
        """Called after each step, with all its micro-batches behind, whether it ends with an update or not."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer is made for each that has ``params``; ``lr_scale`` may be a factor on its learning rate."""
        return [{"params": list(self.parameters())}]


def detached(carry: Carry) -> Carry:
    """The same tensors without their history: where the gradient is cut."""
    return pytree.tree_map_only(Tensor, Tensor.detach, carry)


def floating(carry: Carry) -> list[Tensor]:
    """The floating-point tensors of a carry in order: those that gradients belong to."""
    tensors = (leaf for leaf in pytree.tree_leaves(carry) if isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def seed_operators(seed: int, block: int, step: int, micro_batch: int, replica: int = 0) -> None:
    """Let one block, such as its dropout, draw from (seed, block, step, micro-batch, replica), whatever ran before."""
    spec = (block, step, micro_batch, replica) if replica else (block, step, micro_batch)
    number = seeds.derive(seed, "dropout", *spec)
    # Not torch.manual_seed: without a GPU it formats a stack and queues a call for later, each time, without end.
    torch.default_generator.manual_seed(number)
    seeds.seed_python(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)
