"""The embedded data: scikit-learn's 1,797 real images of handwritten digits, which need no download.

The 8x8 images are enlarged to 16x16, so that a small convolutional network can halve their size twice.
Digits are never mirrored: that would change some of them into no digit at all.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from scpl_dist.data.images import ImageSource
from scpl_dist.run.config import Config

MEAN, STD = 0.3055, 0.3192
"""Mean and standard deviation of the enlarged training images, rounded: constants keep runs bit-identical."""


def load(config: Config) -> ImageSource:
    """10 classes; about 70 % training, 10 % validation and 20 % test."""
    from sklearn.datasets import load_digits  # takes a second, and only stage 0 of a run on digits needs it

    table = load_digits()
    images = torch.tensor(table.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.tensor(table.target, dtype=torch.int64)
    return ImageSource(config, {"train": (images, labels)}, 10, [MEAN], [STD], flip=False)
