"""The embedded data: scikit-learn's 1,797 real images of handwritten digits, which need no download.

The 8x8 images are enlarged to 16x16, so that a small convolutional network can halve their size twice.
Digits are never mirrored: that would change some of them into no digit at all.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from scpl_dist.data.source import ImageSource
from scpl_dist.data.splits import stratified
from scpl_dist.run.config import Config

MEAN, STD = 0.3055, 0.3192
"""Mean and standard deviation of the enlarged training images, rounded: constants keep runs bit-identical."""


def load(config: Config) -> ImageSource:
    """10 classes; a fixed stratified split in about 70 % training, 10 % validation and 20 % test."""
    table = torch.from_numpy(np.loadtxt(_file(), delimiter=","))
    images = table[:, :-1].float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    labels = table[:, -1].long()
    train, validation, test = stratified(labels, (0.1, 0.2))
    parts = {
        "train": (images[train], labels[train]),
        "validation": (images[validation], labels[validation]),
        "test": (images[test], labels[test]),
    }
    return ImageSource(
        parts, 10, [MEAN], [STD], augmentation=config.data.augmentation, flip=False, seed=config.run.seed
    )


def _file() -> Path:
    """A table of 64 pixels and the digit a row, found without importing scikit-learn, which takes a second."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
