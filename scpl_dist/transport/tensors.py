"""Tensors on their way: what describes them, in which type they travel, and when a GPU may use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_SMALLER = [torch.iinfo(dtype) for dtype in (torch.uint8, torch.int16, torch.int32)]
Wide = list[tuple[int, str]]  # numbers of leaves that travel in a smaller type, and their own type


def describe(value: Any, giver: str = "a block") -> Any:
    """A pytree as plain values: [dtype, shape, strides] in the place of each tensor. `imagine` is the inverse.

    ValueError, which names who gave it, if it has something else than tensors in tuples, lists and dicts.
    """
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), list(value.shape), list(value.stride())]
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[key, describe(part, giver)] for key, part in value.items()]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe(part, giver) for part in value]}
    raise ValueError(
        f"{giver} gives a {type(value).__name__}, which cannot travel: use tensors, and tuples, lists or "
        "dicts of tensors"
    )


def imagine(description: Any, device: torch.device | str) -> Any:
    """The pytree of a description, with tensors whose values are not set."""
    if description is None:
        return None
    if isinstance(description, list):
        dtype, shape, strides = description
        return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=device)
    if "dict" in description:
        return {key: imagine(part, device) for key, part in description["dict"]}
    if "tuple" in description:
        return tuple(imagine(part, device) for part in description["tuple"])
    return [imagine(part, device) for part in description["list"]]


def nbytes(payload: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(payload) if isinstance(leaf, Tensor))


def narrow(payload: Any, dtype: torch.dtype) -> tuple[Any, Wide]:
    """Make the tensors of a pytree small for the way; also returns what `widen` must convert back.

    Tensors of float32 get the given type. Integers (labels) lose nothing: they get the smallest type that holds all
    values of their tensor, unless they are on a GPU, which would have to be waited for.
    """
    leaves, spec = pytree.tree_flatten(payload)
    wide: Wide = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.dtype is torch.float32 and dtype is not torch.float32:
            leaves[number] = leaf.to(dtype)
        elif leaf.dtype is torch.int64 and leaf.device.type == "cpu" and leaf.numel():
            leaves[number] = leaf.to(_smallest(leaf))
        if leaves[number].dtype is not leaf.dtype:
            wide.append((number, str(leaf.dtype).removeprefix("torch.")))
    return (pytree.tree_unflatten(leaves, spec), wide) if wide else (payload, wide)


def _smallest(tensor: Tensor) -> torch.dtype:
    values = tensor.detach().numpy()  # shares memory, and is quicker for a few numbers
    low, high = values.min(), values.max()
    fits = (info.dtype for info in _SMALLER if info.min <= low and high <= info.max)
    return getattr(torch, next(fits, "int64"))  # type: ignore[no-any-return]


def widen(payload: Any, wide: Wide) -> Any:
    """Undo `narrow`, but for the bits that it took from floats."""
    if not wide:
        return payload
    leaves, spec = pytree.tree_flatten(payload)
    for number, name in wide:
        leaves[number] = leaves[number].to(getattr(torch, name))
    return pytree.tree_unflatten(leaves, spec)


def to_device(payload: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), payload)


def adopt(payload: Any, event: Any) -> None:
    """Let the training stream wait for CUDA tensors that another one fills until `event`, and keep their memory."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for leaf in pytree.tree_leaves(payload):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
