"""A message as a header of plain values and the bytes of its tensors, without pickle.

header   msgpack: item, micro-batch, weight, and the pytree with [dtype, shape, strides] in the place of each tensor
tensors  each one dense block of bytes in the order of its memory, so strides survive the way
"""

from __future__ import annotations

from typing import Any

import msgpack
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.transport import Envelope
from scpl_dist.transport.tensors import describe, imagine


def pack(message: Envelope) -> tuple[bytes, list[Tensor]]:
    """Header and tensors of a message: one-dimensional, uint8, none of them empty; raises as `describe` does."""
    payload = pytree.tree_map_only(Tensor, _without_gaps, message.payload)
    plain = [message.item, message.micro_batch, message.weight, describe(payload), message.wide]
    header: bytes = msgpack.packb(plain)
    return header, _bytes(payload)


def unpack(header: bytes, device: torch.device) -> tuple[Envelope, list[Tensor]]:
    """The message of a header, and the tensors into which its bytes have to be received."""
    item, micro_batch, weight, description, wide = msgpack.unpackb(header)
    payload = imagine(description, device)
    return Envelope(item, micro_batch, payload, weight, wide), _bytes(payload)


def _bytes(payload: Any) -> list[Tensor]:
    return [
        _dense(leaf).reshape(-1).view(torch.uint8)
        for leaf in pytree.tree_leaves(payload)
        if isinstance(leaf, Tensor) and leaf.numel()
    ]


def _without_gaps(tensor: Tensor) -> Tensor:
    return tensor if _dense(tensor).is_contiguous() else tensor.contiguous()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in the order of memory; contiguous if its memory has no gaps and no overlaps."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.size(dim)), reverse=True)
    return tensor.detach().permute(order)
