"""Finds the shapes between blocks, and blocks that do not fit, before any worker computes.

Blocks run on tensors without storage ("meta"), so a network of any size is traced at once and without
memory. A block that cannot run that way, for example because it looks at values, runs on zeros on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree


def spec(value: Any, device: str = "meta") -> Any:
    """The same pytree with zeros for every tensor; on "meta" they have a shape and a dtype but no storage."""
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device), value
    )


def trace(blocks: Sequence[nn.Module], example: Any) -> list[Any]:
    """What consecutive blocks return for one input: for each a pytree of tensors without storage.

    The blocks may be on the CPU or on "meta"; their parameters and buffers are not changed. Of the input only shapes
    and dtypes are read; it has at least 2 samples. ValueError if a block cannot take what the block before it returns,
    or loses the batch dimension.
    """
    specs = [spec(example)]
    samples = int(pytree.tree_leaves(specs[0])[0].shape[0])
    for index, block in enumerate(blocks):
        output = _run(index, block, specs[-1])
        leaves = pytree.tree_leaves(output)
        batches = [isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (samples,) for leaf in leaves]
        if not batches or not all(batches):
            raise ValueError(
                f"block {index} ({type(block).__name__}) returns {_shapes(output)} for {samples} samples: "
                "return a tensor, or a list, tuple or dict of tensors, whose first dimension is the batch"
            )
        specs.append(output)
    return specs[1:]


def _run(index: int, block: nn.Module, entered: Any) -> Any:
    try:
        return _call(block, spec(entered), "meta")
    except Exception:  # whatever a block raises on tensors without values, the real run below decides
        pass
    try:
        return _call(block, spec(entered, "cpu"), "cpu")
    except Exception as error:
        source = "the data (see docs/models.md for what models read)" if index == 0 else f"block {index - 1}"
        parameters = (f"{name} of shape {tuple(weight.shape)}" for name, weight in block.named_parameters())
        raise ValueError(
            f"block {index} ({type(block).__name__}, {next(parameters, 'no parameters')}) does not fit: it cannot take "
            f"{_shapes(entered)} from {source}: {error}"
        ) from error


def overwrites(block: nn.Module, entered: Any) -> bool:
    """Whether a block changes a tensor that it is given, as one that begins with ReLU(inplace=True) does.

    False also if it cannot run on tensors without storage.
    """
    given = spec(entered)
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    before = [tensor._version for tensor in tensors]
    try:
        _call(block, given, "meta")
    except Exception:
        return False
    return before != [tensor._version for tensor in tensors]


def _call(block: nn.Module, given: Any, device: str) -> Any:
    """Run `block` in evaluation mode on copies of its state, so that running averages stay as they are."""
    state = {}
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        here = tensor.device.type == device
        state[name] = tensor.detach().clone() if here else torch.empty_like(tensor, device=device)
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with torch.no_grad():
            return spec(functional_call(block, state, (given,)))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _shapes(value: Any) -> str:
    def shape(leaf: Any) -> Any:
        return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__

    return str(pytree.tree_map(shape, value))
