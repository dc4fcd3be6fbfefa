"""A message as a header of plain values and the bytes of its tensors, without pickle.

header   msgpack: item, micro-batch, and the pytree with [dtype, shape, strides] in the place of each tensor
tensors  each one dense block of bytes in the order of its memory, so strides survive the way
"""

from __future__ import annotations

from typing import Any

import msgpack
import torch
from torch import Tensor

from scpl_dist.transport import Envelope

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Parcel:
    """A message ready for the way, or on arrival waiting for its bytes.

    Attributes:
        header: what `open_parcel` reads.
        tensors: one-dimensional uint8 tensors, none of them empty.
    """

    __slots__ = ("header", "message", "tensors")

    def __init__(self, header: bytes, tensors: list[Tensor], message: Envelope) -> None:
        self.header = header
        self.tensors = tensors
        self.message = message


def pack(message: Envelope) -> Parcel:
    """Take a message apart.

    Raises:
        ValueError: the payload has something else than tensors in tuples, lists and dicts.
    """
    tensors: list[Tensor] = []
    plan = _describe(message.payload, tensors)
    header: bytes = msgpack.packb([message.item, message.micro_batch, plan, message.wide])
    return Parcel(header, tensors, message)


def open_parcel(header: bytes, device: torch.device) -> Parcel:
    """The message of a header, and the tensors into which its bytes have to be received."""
    item, micro_batch, plan, wide = msgpack.unpackb(header)
    tensors: list[Tensor] = []
    payload = _imagine(plan, tensors, device)
    return Parcel(header, tensors, Envelope(item, micro_batch, payload, wide))


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        dense = _dense(value)
        if dense is None:
            value = value.contiguous()
            dense = _dense(value)
            assert dense is not None
        if value.numel():
            tensors.append(dense.reshape(-1).view(torch.uint8))
        return [_NAMES[value.dtype], list(value.shape), list(value.stride())]
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[key, _describe(part, tensors)] for key, part in value.items()]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_describe(part, tensors) for part in value]}
    raise ValueError(
        f"a block gives a {type(value).__name__}, which cannot travel: use tensors, and tuples, lists or "
        "dicts of tensors"
    )


def _imagine(plan: Any, tensors: list[Tensor], device: torch.device) -> Any:
    if plan is None:
        return None
    if isinstance(plan, list):
        name, shape, strides = plan
        tensor = torch.empty_strided(shape, strides, dtype=_DTYPES[name], device=device)
        if tensor.numel():
            dense = _dense(tensor)
            assert dense is not None
            tensors.append(dense.view(-1).view(torch.uint8))
        return tensor
    if "dict" in plan:
        return {key: _imagine(part, tensors, device) for key, part in plan["dict"]}
    if "tuple" in plan:
        return tuple(_imagine(part, tensors, device) for part in plan["tuple"])
    return [_imagine(part, tensors, device) for part in plan["list"]]


def _dense(tensor: Tensor) -> Tensor | None:
    """The tensor with its dimensions in the order of memory, or None if its memory has gaps or overlaps."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.size(dim)), reverse=True)
    dense = tensor.detach().permute(order)
    return dense if dense.is_contiguous() else None
