"""CIFAR-10 and CIFAR-100, read by torchvision, and downloaded by it only if ``data.download`` asks for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision import datasets

from scpl_dist.data import ImageSource, MissingFiles
from scpl_dist.run.config import Config


def cifar10(config: Config, validation: float = 0.1) -> ImageSource:
    """CIFAR-10: 10 classes, 50,000 training images, of which `validation` are held out, 10,000 test images."""
    return _cifar(config, "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), validation)


def cifar100(config: Config, validation: float = 0.1) -> ImageSource:
    """CIFAR-100: 100 classes, 50,000 training images, of which `validation` are held out, 10,000 test images."""
    return _cifar(config, "CIFAR100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), validation)


def _cifar(
    config: Config, name: str, classes: int, mean: Sequence[float], std: Sequence[float], validation: float
) -> ImageSource:
    root = config.data.root
    dataset = getattr(datasets, name)
    parts, names = {}, None
    try:
        for split, train in (("train", True), ("test", False)):
            stored = dataset(root, train=train, download=config.data.download)
            names = stored.classes
            images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
            parts[split] = (images, torch.tensor(stored.targets))
    except (RuntimeError, OSError) as error:
        message = (
            f"data.root = {root!r}: {name} is missing or damaged there ({error}): get {dataset.url} and "
            f"unpack it, so that there is a folder {Path(root) / dataset.base_folder}; "
            "or set data.download = true"
        )
        raise MissingFiles(message, classes, torch.zeros(2, 3, 32, 32)) from None
    return ImageSource(config, parts, classes, mean, std, validation=validation, names=names)
