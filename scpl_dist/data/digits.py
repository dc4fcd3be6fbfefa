"""The embedded data: scikit-learn's 1,797 real images of handwritten digits, which need no download.

The 8x8 images are enlarged to 16x16, so that a small convolutional network can halve their size twice.
Digits are never mirrored: that would change some of them into no digit at all.
"""

from __future__ import annotations

from importlib.metadata import distribution

import numpy as np
import torch
from torch.nn import functional as F

from scpl_dist.data.images import ImageSource
from scpl_dist.run.config import Config

# A table of 64 pixels and the digit a row, read without importing scikit-learn, which takes a second.
FILE = "sklearn/datasets/data/digits.csv.gz"
# Mean and standard deviation of the enlarged training images, rounded: constants keep runs bit-identical.
MEAN, STD = 0.3055, 0.3192


def load(config: Config) -> ImageSource:
    """10 classes; about 70 % training, 10 % validation and 20 % test."""
    table = torch.from_numpy(np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=","))
    images = table[:, :-1].float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return ImageSource(config, {"train": (images, table[:, -1].long())}, 10, [MEAN], [STD], flip=False)
