"""VGG8 with the sizes of the published SCPL code (arXiv 2602.00062)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from scpl_dist.models import vgg_blocks


def vgg8(classes: int, channels: int = 3) -> list[Callable[[], nn.Module]]:
    """VGG8 for 32x32 images: 6 convolutions in 4 blocks, 6.8 million parameters."""
    plan = [(128, 256, "M"), (256, 512, "M"), (512, "M"), (512, "M")]
    return vgg_blocks(plan, channels, (512, 1024), "sigmoid,2500")
