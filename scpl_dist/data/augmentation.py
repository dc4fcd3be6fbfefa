"""Augmentation of a batch of images, drawn from (seed, epoch, sample) and computed for all images at once.

Each sample's numbers come from a hash of its position, not from a generator's state, so they do not depend
on the batch it is in, on the thread that prepares it or on where a run was resumed. Colour jitter has the
meaning of torchvision's functions, with a factor for each image instead of one for the batch.

Images are ``(N, C, H, W)`` float32 in [0, 1]; numbers are float64 in [0, 1), one row for each image.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from scpl_dist.run.seeds import derive

DRAWS = 13  # numbers that a sample needs: shift and flip of view 1, then of view 2, then colour of view 2
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4): of the colour operations


def uniform(seed: int, epoch: int, samples: torch.Tensor) -> torch.Tensor:
    """``(N, DRAWS)`` numbers for samples ``(N,)``: SplitMix64 (Steele et al. 2014) at the counter of the number."""
    key = np.uint64(derive(seed, "augmentation", epoch))
    draws = np.arange(1, DRAWS + 1, dtype=np.uint64)
    counter = samples.numpy().astype(np.uint64)[:, None] * np.uint64(DRAWS) + draws
    # Unsigned arithmetic of numpy arrays wraps, as the hash wants.
    state: npt.NDArray[Any] = key + counter * _GAMMA
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def views(images: torch.Tensor, numbers: torch.Tensor, kind: str, shift: int, flip: bool) -> torch.Tensor:
    """One view of each image with shift and flip ("basic"), then a second one with colour, too ("strong")."""
    first = shift_and_flip(images, numbers[:, :3], shift, flip)
    if kind == "basic":
        return first
    return torch.cat([first, jitter(shift_and_flip(images, numbers[:, 3:6], shift, flip), numbers[:, 6:])])


def shift_and_flip(images: torch.Tensor, numbers: torch.Tensor, shift: int, flip: bool) -> torch.Tensor:
    """Crop each image from itself with `shift` black pixels on each side; `numbers` are row, column and mirror."""
    size, _, height, width = images.shape
    offsets = (numbers[:, :2] * (2 * shift + 1)).long()
    windows = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2s+1, 2s+1, H, W)
    moved = windows[torch.arange(size), :, offsets[:, 0], offsets[:, 1]]
    if not flip:
        return moved
    return torch.where((numbers[:, 2] < 0.5)[:, None, None, None], moved.flip(3), moved)


def jitter(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Colour changes of SCPL's second view: ColorJitter(.4, .4, .4, .1) with p = .8, then grey with p = .2.

    `numbers` are apply, brightness, contrast, saturation, hue, order and grey.
    """
    images = images.clone()
    chosen = numbers[:, 0] < 0.8
    factors = (0.6 + 0.8 * numbers[:, 1:5]).float()
    factors[:, 3] = (0.2 * numbers[:, 4] - 0.1).float()
    order = _ORDERS[(numbers[:, 5] * len(_ORDERS)).long()]
    for position, operation in itertools.product(range(4), range(4)):
        rows = (chosen & (order[:, position] == operation)).nonzero().flatten()
        if len(rows):
            images[rows] = _adjust(operation, images[rows], factors[rows, operation, None, None, None])
    rows = (numbers[:, 6] < 0.2).nonzero().flatten()
    images[rows] = _grey(images[rows]).expand_as(images[rows])
    return images


def _adjust(operation: int, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    if operation == 0:
        return (images * factors).clamp(0, 1)
    if operation == 1:
        return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factors)
    if images.shape[1] == 1:
        return images
    if operation == 2:
        return _blend(images, _grey(images), factors)
    return adjust_hue(images, factors)


def _blend(images: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (factors * images + (1 - factors) * others).clamp(0, 1)


def _grey(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images[:, :3].unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def adjust_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the hue of RGB images ``(N, 3, H, W)`` in [0, 1] by `turns` ``(N, 1, 1, 1)`` full circles."""
    value, spread = images.amax(1), images.amax(1) - images.amin(1)
    red, green, blue = images.unbind(1)
    safe = spread.clamp(min=1e-12)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sector + 6 * turns[:, 0]
    # HSV to RGB in one formula: channel n is V - S*V*max(0, min(k, 4-k, 1)), k = (n + H/60 degrees) mod 6.
    turned = [(number + hue) % 6 for number in (5.0, 3.0, 1.0)]
    return torch.stack([value - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in turned], dim=1)
