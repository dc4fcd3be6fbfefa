"""Tensors on their way: what describes them, in which type they travel, and where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.transport.quantization import dequantize, quantize

# Without int8: what has come as that is the code of a float.
_SMALLER = [torch.iinfo(dtype) for dtype in (torch.uint8, torch.int16, torch.int32)]
_WIDEST = torch.float32  # float64 travels as it is: sums that all stages have to agree on
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

    Floats that have more bytes than the given type get that one; where it is int8, their scales travel behind, as
    ``(pytree, scales)``. Integers (labels) lose nothing: they get the smallest type that holds all values of their
    tensor, unless they are on a GPU, which would have to be waited for.
    """
    leaves, spec = pytree.tree_flatten(payload)
    wide: Wide = []
    scales: list[Tensor] = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.numel():
            continue
        own = leaf.dtype
        if own.is_floating_point and dtype.itemsize < own.itemsize <= _WIDEST.itemsize:
            if dtype is torch.int8:
                leaves[number], scale = quantize(leaf)
                scales.append(scale)
            else:
                leaves[number] = leaf.to(dtype)
        elif own is torch.int64 and leaf.device.type == "cpu":
            leaves[number] = leaf.to(_smallest(leaf))
        if leaves[number].dtype is not own:
            wide.append((number, str(own).removeprefix("torch.")))
    if not wide:
        return payload, wide
    small = pytree.tree_unflatten(leaves, spec)
    return ((small, scales) if scales else small), wide


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
    coded = [number for number, _ in wide if leaves[number].dtype is torch.int8]
    scales = dict(zip(coded, leaves[len(leaves) - len(coded) :], strict=True))
    for number, name in wide:
        own = getattr(torch, name)
        leaves[number] = (
            dequantize(leaves[number], scales[number], own) if number in scales else leaves[number].to(own)
        )
    large = pytree.tree_unflatten(leaves, spec)
    return large[0] if coded else large


def to_device(payload: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), payload)


def out_of_memory(error: Exception) -> bool:
    """Whether an error is that, of a GPU or of this process; on the CPU torch has no class of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
