"""Floats as 8-bit integers with a scale for each group of them: a quarter of float32's bytes, and fewer bits.

A group is the last dimension of a tensor, with as many before it as it takes to have 64 values, but never more than
one sample: a token of a text, a channel of an image (or all channels, where an image has become small), a vector. So
scales add at most a sixteenth to the bytes, a sample does not depend on those beside it, and one large value makes
only its own group coarse. Codes are symmetric, -127 to 127, by the largest value of the group (absmax), and rounded to
the nearest, half to even: the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  # fewest values that share a scale, where a sample has as many
_LARGEST = 127
_SMALLEST = torch.finfo(torch.float32).tiny  # scale; a quotient by a smaller one could overflow


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8, with shape and strides of a tensor of floats that is not empty, and scales, float32.

    Scales have the same number of dimensions, of size 1 within a group. Where a value of the group is not finite its
    scale is not, and so is nothing that `dequantize` makes of the group.
    """
    wide = tensor.detach().float()
    first = max(0, wide.dim() - 1)
    while first > 1 and wide.shape[first:].numel() < GROUP:
        first -= 1
    dims = tuple(range(first, wide.dim()))
    # Not by `abs`, whose copy of all values takes longer than everything else here.
    largest = torch.maximum(wide.amax(dims, keepdim=True), wide.amin(dims, keepdim=True).neg())
    scales = largest.div_(_LARGEST).clamp_min_(_SMALLEST)
    codes = torch.empty_like(tensor, dtype=torch.int8)
    return codes.copy_((wide / scales).round_()), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of codes, of the given type, with shape and strides of these."""
    return codes.to(torch.float32).mul_(scales).to(dtype)
