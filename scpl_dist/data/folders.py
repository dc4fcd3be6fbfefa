"""Folders with one folder of images for each class.

An image is decoded when a batch first needs it, so a run starts at once, and kept as bytes if all fit in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from scpl_dist.data.images import ImageSource
from scpl_dist.data.pictures import EXTENSIONS, decoded, opened
from scpl_dist.run.config import Config

CACHE_BYTES = 4 * 2**30  # decoded images of one part are kept in memory up to this size


def image_folder(
    config: Config,
    size: int | None = None,
    channels: Literal[1, 3] = 3,
    flip: bool = True,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    validation: float = 0.1,
) -> ImageSource:
    """``data.root`` has ``train/CLASS/*.png``, ``val/...`` and ``test/...``, or just ``CLASS/*.png``.

    Without a test folder, "val" is the test part; without any parts, a fifth of the images of each class is. See
    `image_part` for `size` and `channels`, and `ImageSource` for the others.
    """
    root = Path(config.data.root)
    if not root.is_dir():
        raise ValueError(f"data.root = {config.data.root!r}: there is no such folder; put the images there")
    names = [name for name in ("train", "val", "valid", "validation", "test") if (root / name).is_dir()]
    folders = {"validation" if name.startswith("val") else name: root / name for name in names}
    if "train" not in folders:
        folders = {"train": root}
    if "test" not in folders and "validation" in folders:
        folders["test"] = folders.pop("validation")
    classes = class_names(folders["train"])
    files = {part: find_images(folder, classes) for part, folder in folders.items()}
    parts = {part: image_part(found, size, channels) for part, found in files.items()}
    return ImageSource(
        config, parts, len(classes), _each(mean, channels), _each(std, channels), flip, validation, classes
    )


def class_names(folder: Path) -> list[str]:
    """Names of the folders in a folder, in alphabetic order; ValueError for fewer than two."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) < 2:
        raise ValueError(
            f"{folder}: has {len(names)} folders of classes, a classifier needs at least 2: "
            "put the images of each class in a folder of its own"
        )
    return names


def find_images(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Image files at any depth in folders of classes, with labels; ValueError if one has none or is no class."""
    samples: list[tuple[Path, int]] = []
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        if entry.name not in classes:
            raise ValueError(
                f"{folder}: class {entry.name!r} is not among the {len(classes)} of the training part"
            )
        files = sorted(path for path in entry.rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise ValueError(f"{entry}: has no images ({', '.join(EXTENSIONS)})")
        samples += [(path, classes.index(entry.name)) for path in files]
    if not samples:
        raise ValueError(
            f"{folder}: has no folders of classes: put the images of each class in a folder of its own"
        )
    return samples


def image_part(
    samples: Sequence[tuple[Path, int]], size: int | None, channels: int = 3
) -> tuple[ImageFiles, torch.Tensor]:
    """Image files and their labels as a part for `ImageSource`, with 3 channels for RGB or 1 for grey.

    The shorter side is resized to `size` and the centre cropped; None takes images as they are, and raises ValueError
    for images of several sizes and for a file that is no image.
    """
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return ImageFiles([path for path, _ in samples], size, channels), labels


class ImageFiles:
    """Image files that are read like a tensor ``(N, C, H, W)`` of uint8, decoded when first needed."""

    def __init__(self, paths: list[Path], size: int | None, channels: int) -> None:
        self._paths = paths
        height, width = (size, size) if size is not None else self._common_size()
        self.shape = (len(paths), channels, height, width)
        self._image = decoded
        if math.prod(self.shape) <= CACHE_BYTES:
            self._image = functools.cache(decoded)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._image(self._paths[index], *self.shape[1:]) for index in indices.tolist()])

    def _common_size(self) -> tuple[int, int]:
        found: dict[tuple[int, int], Path] = {}
        for path in self._paths:
            with opened(path) as image:  # reads the header only
                found.setdefault(image.size, path)
        sizes = list(found)
        if len(sizes) > 1:
            first, odd = (f"{found[size]} has {size[0]}x{size[1]}" for size in sizes[:2])
            raise ValueError(f"{odd} pixels, {first}: set data.args.size to resize all images to one size")
        return sizes[0][1], sizes[0][0]


def _each(values: Sequence[float], channels: int) -> list[float]:
    listed = [float(value) for value in values]
    if channels == 1 and len(listed) == 3:
        return [sum(listed) / 3]
    if len(listed) != channels:
        raise ValueError(
            f"data.args: mean and std {listed} have {len(listed)} values for {channels} channels"
        )
    return listed
