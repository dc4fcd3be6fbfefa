"""Images of one size in memory or in files, normalised and augmented as a whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scpl_dist.data.augmentation import uniform, views
from scpl_dist.data.pictures import Images, unit
from scpl_dist.data.source import DataSource, Split
from scpl_dist.data.splits import complete
from scpl_dist.run.config import Config


class ImageSource(DataSource):
    """Images for classification.

    Args:
        parts: images ``(N, C, H, W)``, uint8 or float32 in [0, 1], and labels ``(N,)`` int64 of "train" and perhaps of
            "validation" and "test"; missing parts are held out of the training part. The images are a tensor, or
            something with its shape that is indexed by positions ``(B,)``, such as files.
        mean, std: of each channel in units of the full range; a batch becomes ``(images - mean) / std``.
        flip: whether mirrored images keep their class.
        validation: share of the training part that becomes the validation part, if there is none.
        names: of the classes, in the order of their labels; None calls them by number.

    Raises:
        ValueError: images of several sizes, labels that are no class, an impossible share.
    """

    def __init__(
        self,
        config: Config,
        parts: Mapping[str, tuple[Any, torch.Tensor]],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool = True,
        validation: float = 0.1,
        names: Sequence[str] | None = None,
    ) -> None:
        where = f"data.root = {config.data.root!r}"
        shapes = {tuple(images.shape[2:]) for images, _ in parts.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"{where}: the parts have images of {sorted(shapes)} pixels; set data.args.size to resize them"
            )
        labels = {split: labels for split, (_, labels) in parts.items()}
        self._images = {split: images for split, (images, _) in parts.items()}
        self._parts = complete(labels, classes, where, validation)
        self.classes = classes
        self.sizes = {split: len(part.labels) for split, part in self._parts.items()}
        channels, height, width = next(iter(self._images.values())).shape[1:]
        self._pictures = Images(
            classes=[str(name) for name in (names or range(classes))],
            channels=channels,
            height=height,
            width=width,
            mean=list(map(float, mean)),
            std=list(map(float, std)),
        )
        self.preprocessing = self._pictures
        self._augmentation = config.data.augmentation
        self._flip = flip
        self._seed = config.run.seed
        self._shift = width // 8  # 4 pixels for 32x32 images, as published

    def training_labels(self) -> torch.Tensor:
        """See `DataSource.training_labels`."""
        return self._parts["train"].labels

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DataSource.batch`; inputs are ``(B, C, H, W)`` float32, normalised."""
        part = self._parts[split]
        images, labels = self._images[part.stored][part.positions[indices]], part.labels[indices]
        images = unit(images)
        if split == "train" and self._augmentation != "none":
            numbers = uniform(self._seed, epoch, indices)
            images = views(images, numbers, self._augmentation, self._shift, self._flip)
            labels = labels.repeat(len(images) // len(labels))
        return self._pictures.normalised(images), labels
