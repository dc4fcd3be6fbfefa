"""MNIST, Fashion-MNIST, SVHN, Flowers-102 and Food-101, in the layouts that torchvision downloads.

They are downloaded, by torchvision, only if ``data.download`` asks for that.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torchvision import datasets

from scpl_dist.data import ImageSource, MissingFiles, image_part
from scpl_dist.run.config import Config

Stored = TypeVar("Stored")
Part = tuple[torch.Tensor, torch.Tensor]  # images (N, C, H, W) uint8, labels (N,) int64
# Of ImageNet, as usual for photographs.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mnist(config: Config, validation: float = 0.1) -> ImageSource:
    """MNIST: 10 digits, 60,000 training images 28x28, of which `validation` are held out, 10,000 test images."""
    return _idx_files(config, "MNIST", 0.1307, 0.3081, flip=False, validation=validation)


def fashion_mnist(config: Config, validation: float = 0.1) -> ImageSource:
    """Fashion-MNIST: 10 kinds of clothing, otherwise as MNIST."""
    return _idx_files(config, "FashionMNIST", 0.2860, 0.3530, flip=True, validation=validation)


def svhn(config: Config, validation: float = 0.1) -> ImageSource:
    """SVHN: 10 digits on houses, 73,257 training images 32x32, of which `validation` are held out, 26,032 to test."""

    def part(split: str) -> Part:
        stored = datasets.SVHN(config.data.root, split=split, download=config.data.download)
        return torch.from_numpy(np.ascontiguousarray(stored.data)), torch.from_numpy(stored.labels)

    parts = _read(config, "SVHN", 10, (3, 32, 32), _HALVES, part)
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return ImageSource(config, parts, 10, mean, std, flip=False, validation=validation)


def flowers102(config: Config, size: int = 64) -> ImageSource:
    """Flowers-102: 102 flowers, 1,020 training, 1,020 validation and 6,149 test images, resized to `size`."""
    splits = {"train": "train", "validation": "val", "test": "test"}
    return _photographs(config, "Flowers102", 102, splits, size)


def food101(config: Config, size: int = 64, validation: float = 0.1) -> ImageSource:
    """Food-101: 101 dishes, 75,750 training images, of which `validation` are held out, 25,250 test images."""
    return _photographs(config, "Food101", 101, {split: split for split in _HALVES}, size, validation)


_HALVES = ("train", "test")


def _idx_files(
    config: Config, name: str, mean: float, std: float, flip: bool, validation: float
) -> ImageSource:
    """The files may be as published, in ``data.root`` itself or in torchvision's folder, also unpacked."""
    root = Path(config.data.root)
    raw = root / name / "raw"

    def stored(split: str, kind: str) -> torch.Tensor:
        file = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte"
        found = [
            path for folder in (root, raw) for path in (folder / file, folder / f"{file}.gz") if path.exists()
        ]
        if not found:
            raise FileNotFoundError(f"there is no {file}.gz, here or in {raw}")
        return _idx(found[0])

    def part(split: str) -> Part:
        if config.data.download:
            getattr(datasets, name)(root, download=True)
        images, labels = stored(split, "images-idx3"), stored(split, "labels-idx1")
        if images.dim() != 3 or images.shape[:1] != labels.shape:
            raise ValueError(f"{tuple(images.shape)} are no images for {tuple(labels.shape)} labels")
        return images[:, None], labels.long()

    parts = _read(config, name, 10, (1, 28, 28), _HALVES, part)
    names = datasets.FashionMNIST.classes if name == "FashionMNIST" else None
    return ImageSource(config, parts, 10, [mean], [std], flip, validation, names)


def _idx(path: Path) -> torch.Tensor:
    """An array of bytes in the format of MNIST; ValueError or OSError if the file is none."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no IDX file of bytes")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    return torch.from_numpy(array.reshape(shape).copy())


def _photographs(
    config: Config, name: str, classes: int, splits: dict[str, str], size: int, validation: float = 0.1
) -> ImageSource:
    def part(split: str) -> list[tuple[Path, int]]:
        stored = getattr(datasets, name)(config.data.root, split=split, download=config.data.download)
        return list(zip(stored._image_files, stored._labels, strict=True))

    found = _read(config, name, classes, (3, size, size), tuple(splits.values()), part)
    parts = {ours: image_part(found[theirs], size) for ours, theirs in splits.items()}
    return ImageSource(config, parts, classes, MEAN, STD, validation=validation)


def _read(
    config: Config,
    name: str,
    classes: int,
    shape: Sequence[int],
    splits: Sequence[str],
    read: Callable[[str], Stored],
) -> dict[str, Stored]:
    """What `read` gives for each; MissingFiles if it finds no files that it can use."""
    try:
        return {split: read(split) for split in splits}
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        message = (
            f"data.root = {config.data.root!r}: {name} is missing or damaged there ({error}): "
            f"set data.download = true, or put the files there as torchvision.datasets.{name} does"
        )
        raise MissingFiles(message, classes, torch.zeros(2, *shape)) from None
