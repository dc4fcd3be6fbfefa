"""From a picture to what an image model is given: one size, one number of channels, and normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scpl_dist.data.preprocessing import Preprocessing

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Images(Preprocessing):
    """Pictures are scaled until they cover the size, and the centre is cropped; then ``(pixels - mean) / std``."""

    kind = "images"

    channels: int  # 3 for RGB, 1 for grey
    height: int
    width: int
    mean: list[float]  # of each channel, in units of the full range
    std: list[float]

    def batch(self, inputs: Sequence[Any]) -> Tensor:
        """``(B, C, H, W)`` float32 of image files, PIL images, arrays ``(H, W)`` or ``(H, W, C)`` uint8, or tensors.

        A tensor is ``(C, H, W)`` of the model's size, uint8 or float in [0, 1].
        """
        return self.normalised(torch.stack([unit(self._pixels(raw)) for raw in inputs]))

    def normalised(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] with mean 0 and deviation 1, as far as the settings are theirs."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def read(self, path: Path) -> Iterator[tuple[str, Any]]:
        """An image file, or all of a folder at any depth, in alphabetic order."""
        if path.is_file():
            yield str(path), path
            return
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
        if not found:
            what = "has no images" if path.is_dir() else "there is no such file or folder"
            raise ValueError(f"{path}: {what}; give an image or a folder of them ({', '.join(EXTENSIONS)})")
        yield from ((str(file), file) for file in found)

    def _pixels(self, raw: Any) -> Tensor:
        size = (self.channels, self.height, self.width)
        if isinstance(raw, Tensor):
            if tuple(raw.shape) != size:
                raise ValueError(
                    f"a tensor of shape {tuple(raw.shape)}: the model takes {size}; "
                    "give a PIL image, or the path of one, to have it resized"
                )
            return raw
        if isinstance(raw, str | Path):
            return decoded(Path(raw), *size)
        if isinstance(raw, np.ndarray):
            if raw.dtype != np.uint8 or raw.ndim not in (2, 3):
                raise ValueError(f"an array of {raw.dtype} {raw.shape}: give (H, W) or (H, W, C) of uint8")
            raw = Image.fromarray(raw)
        if isinstance(raw, Image.Image):
            return pixels(raw, *size)
        raise ValueError(f"{type(raw).__name__} is no image: give a path, a PIL image, an array or a tensor")


def unit(images: Tensor) -> Tensor:
    """Images of uint8 as float32 in [0, 1]; those of floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def opened(path: Path) -> Image.Image:
    """An image file, of which the header has been read; ValueError if it is none."""
    try:
        return Image.open(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None


def decoded(path: Path, channels: int, height: int, width: int) -> Tensor:
    """`pixels` of an image file; ValueError with its path if it is none."""
    with opened(path) as image:
        try:
            return pixels(image, channels, height, width)
        except OSError as error:
            raise ValueError(f"{path}: the image is damaged: {error}") from None


def pixels(image: Image.Image, channels: int, height: int, width: int) -> Tensor:
    """``(C, H, W)`` uint8 of an image that is scaled to cover this size, and cropped around its centre."""
    made = image.convert("RGB" if channels == 3 else "L")
    scale = max(height / made.height, width / made.width)
    made = made.resize(
        (max(width, round(made.width * scale)), max(height, round(made.height * scale))),
        Image.Resampling.BILINEAR,
    )
    left, top = (made.width - width) // 2, (made.height - height) // 2
    array = np.array(made.crop((left, top, left + width, top + height)))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
