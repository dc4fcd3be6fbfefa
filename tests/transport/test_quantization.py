"""Floats as 8-bit integers with scales."""

from __future__ import annotations

import pytest
import torch

from scpl_dist.transport.quantization import dequantize, quantize


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((4, 60, 64), (4, 60, 1)),  # tokens
        ((4, 16, 8, 8), (4, 16, 1, 1)),  # channels
        ((4, 2, 80, 80), (4, 2, 80, 1)),  # lines
        ((4, 96, 2, 2), (4, 1, 1, 1)),  # too small for one each
        ((4, 10), (4, 1)),  # vectors
        ((5,), (1,)),
        ((), ()),
    ],
)
def test_a_group_has_64_values_of_one_sample_and_no_value_is_off_by_more_than_half_a_code(
    shape: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, found = quantize(values)
    assert (codes.dtype, found.dtype) == (torch.int8, torch.float32)
    assert (codes.shape, found.shape) == (shape, scales)
    assert codes.abs().max() == 127
    error = (dequantize(codes, found, torch.float32) - values).abs()
    assert (error <= found * 0.5001).all()


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    values = torch.randn(5, 6, 4, 4)
    values[0] *= 1000
    for whole, alone in zip(quantize(values), quantize(values[3:4]), strict=True):
        assert torch.equal(whole[3:4], alone)


def test_strides_stay_as_they_are() -> None:
    values = torch.randn(3, 8, 8, 8).to(memory_format=torch.channels_last)
    codes, scales = quantize(values)
    assert codes.stride() == dequantize(codes, scales, torch.float32).stride() == values.stride()


def test_zeros_stay_zeros_and_the_smallest_and_largest_values_stay_finite() -> None:
    values = torch.stack([torch.zeros(64), torch.full((64,), 1e-45), torch.full((64,), 3e38)])
    back = dequantize(*quantize(values), torch.float32)
    assert torch.equal(back[:2], torch.zeros(2, 64))
    torch.testing.assert_close(back[2], values[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_a_group_is_finite_where_one_value_is_not(value: float) -> None:
    values = torch.randn(2, 3, 64)
    values[1, 2, 5] = value
    finite = dequantize(*quantize(values), torch.float32).isfinite()
    assert not finite[1, 2].any()
    finite[1, 2] = True
    assert finite.all()
