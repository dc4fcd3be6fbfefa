"""Tensors on their way: how many bytes they are, in which type they travel, and when a GPU may use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["adopt", "narrow", "nbytes", "widen"]


def nbytes(payload: Any) -> int:
    """Bytes of all tensors of a pytree."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(payload) if isinstance(leaf, Tensor))


def narrow(payload: Any, dtype: torch.dtype) -> tuple[Any, list[int]]:
    """Convert the float32 tensors of a pytree for the way.

    Args:
        payload: pytree of tensors.
        dtype: type on the wire; float32 changes nothing.

    Returns:
        The pytree, and the numbers of the leaves that `widen` must convert back.
    """
    if dtype is torch.float32:
        return payload, []
    leaves, spec = pytree.tree_flatten(payload)
    wide = [
        number
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.dtype is torch.float32
    ]
    for number in wide:
        leaves[number] = leaves[number].to(dtype)
    return pytree.tree_unflatten(leaves, spec), wide


def widen(payload: Any, wide: list[int]) -> Any:
    """Undo `narrow`, but for the bits that it took."""
    if not wide:
        return payload
    leaves, spec = pytree.tree_flatten(payload)
    for number in wide:
        leaves[number] = leaves[number].float()
    return pytree.tree_unflatten(leaves, spec)


def adopt(payload: Any, event: Any) -> None:
    """Let the training stream wait for received CUDA tensors and keep their memory until it used them.

    Args:
        payload: pytree of tensors that another stream fills.
        event: `torch.cuda.Event` after which they are filled.
    """
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for leaf in pytree.tree_leaves(payload):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
