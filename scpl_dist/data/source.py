"""What stage 0 feeds: batches by position, made without any state that changes.

A batch depends on (split, epoch, positions) alone. That makes it safe to prepare batches ahead in threads, to
replay a step after a restart, and to compare runs with different numbers of stages bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from scpl_dist.data.augmentation import uniform, views

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DataSource(ABC):
    """A data set with its three parts.

    Attributes:
        classes: number of classes.
        sizes: number of samples of "train", "validation" and "test".
    """

    classes: int
    sizes: dict[str, int]

    @abstractmethod
    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Samples at `indices` (int64, ``(B,)``) of a part, augmented for `epoch` if the part is "train".

        May be called by several threads at once.

        Returns:
            Inputs (a pytree of tensors, batch first) and int64 labels. With "strong" augmentation a training
            batch has 2B samples: the first view of each, then the second view of each, with the labels
            repeated.
        """

    def example(self) -> Any:
        """Inputs of 2 samples, to infer shapes from."""
        return self.batch("validation", 0, torch.tensor([0, 0]))[0]

    def prepare(self, first: nn.Module) -> None:  # noqa: B027  most data sets have nothing to do here
        """Give block 0 what only the data knows, such as word vectors, before the training starts.

        Called once by the process that holds block 0 and reads the data, and not if weights are restored.

        Args:
            first: block 0, on the CPU, changed in place.
        """


class Images(Protocol):
    """Images of one size that are read by position: a tensor, or files that look like one."""

    shape: Any
    """``(N, C, H, W)``."""

    def __getitem__(self, indices: torch.Tensor, /) -> torch.Tensor:
        """Images ``(B, C, H, W)``, uint8 or float32 in [0, 1], for ``(B,)`` int64."""


class ImageSource(DataSource):
    """Images of one size, augmented as a whole batch.

    Args:
        parts: images and labels of each part: ``(N, C, H, W)`` uint8, or float32 in [0, 1]; and ``(N,)``
        int64.
        classes: number of classes.
        mean: mean of each channel in units of the full range, subtracted last.
        std: standard deviation of each channel, divided by last.
        augmentation: "none", "basic" or "strong".
        flip: whether mirrored images keep their class.
        seed: the run's seed.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Images, torch.Tensor]],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str,
        flip: bool,
        seed: int,
    ) -> None:
        self.classes = classes
        self.sizes = {split: len(parts[split][1]) for split in SPLITS}
        self._parts = dict(parts)
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]
        self._augmentation = augmentation
        self._flip = flip
        self._seed = seed
        self._shift = parts["train"][0].shape[-1] // 8  # 4 pixels for 32x32 images, as published

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DataSource.batch`; inputs are ``(B, C, H, W)`` float32, normalised."""
        stored, labels = self._parts[split]
        images, labels = stored[indices], labels[indices]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if split == "train" and self._augmentation != "none":
            numbers = uniform(self._seed, epoch, indices)
            images = views(images, numbers, self._augmentation, self._shift, self._flip)
            labels = labels.repeat(len(images) // len(labels))
        return (images - self._mean) / self._std, labels


def check_share(share: object) -> None:
    """Refuse a share of the training part that cannot be held out for validation.

    Raises:
        ValueError: no number above 0 and up to 0.5.
    """
    if not isinstance(share, int | float) or not 0 < share <= 0.5:
        raise ValueError(
            f"data.args: validation = {share!r}: give the share of the training part to hold out for validation, "
            "above 0 and at most 0.5"
        )


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Refuse labels that are no class.

    Args:
        labels: ``(N,)`` integers.
        classes: number of classes.
        where: the part and data set, for the message.

    Raises:
        ValueError: fewer than two classes, no samples, or a label outside ``0..classes-1``.
    """
    if classes < 2:
        raise ValueError(f"{where}: has {classes} class, a classifier needs at least 2; check the labels")
    if len(labels) == 0:
        raise ValueError(f"{where}: has no samples; check the files")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"{where}: sample {index} has label {int(labels[index])}; "
            f"{classes} classes have the labels 0 to {classes - 1}"
        )
