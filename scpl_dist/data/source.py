"""What stage 0 feeds: batches by position, made without any state that changes.

A batch depends on (split, epoch, positions) alone. That makes it safe to prepare batches ahead in threads, to
replay a step after a restart, and to compare runs with different numbers of stages bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from scpl_dist.data.preprocessing import Preprocessing

Split = Literal["train", "validation", "test"]
Labels = Mapping[str, list[int]]  # of the parts as the data set has them
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DataSource(ABC):
    """A data set with its three parts."""

    classes: int
    sizes: dict[str, int]
    """Number of samples of each part."""
    draws: bool = False
    """Whether `batch` seeds the generators of torch, numpy or ``random`` and draws from them. It puts them back, but is
    called only where nobody else draws meanwhile."""
    labels: Labels = MappingProxyType({})
    """Of parts that had to be read sample by sample for them: whoever opens the data set again may be given them."""
    preprocessing: Preprocessing | None = None
    """What makes inputs of raw ones, which a run keeps for those that come later; None if that is not known."""

    @abstractmethod
    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Samples at `indices` (int64, ``(B,)``) of a part, augmented for `epoch` if the part is "train".

        May be called by several threads at once. Returns inputs (a pytree of tensors, batch first) and int64 labels
        ``(B,)``. With "strong" augmentation a training batch has 2B samples: the first view of each, then the second
        view of each, with the labels repeated.
        """

    def training_labels(self) -> torch.Tensor:
        """Labels of the training part: ``(N,)`` int64. Who has them need not read all samples as here."""
        parts = torch.split(torch.arange(self.sizes["train"]), 256)
        return torch.cat([self.batch("train", 0, part)[1][: len(part)] for part in parts])

    def example(self) -> Any:
        """Inputs of 2 samples, to infer shapes from."""
        return self.batch("validation", 0, torch.tensor([0, 0]))[0]

    def prepare(self, first: nn.Module) -> None:  # noqa: B027  most data sets have nothing to do here
        """Give block 0, on the CPU and changed in place, what only the data knows, such as word vectors.

        Called once before the training by the process that reads the data, and not if weights are restored.
        """


class MissingFiles(ValueError):
    """The files of a known data set are absent: a dry run can check everything else.

    `message` says what is missing, where to get it and where to put it; `classes` is the number that the files have,
    and `example` inputs of 2 samples like theirs, whose values do not matter.
    """

    def __init__(self, message: str, classes: int, example: Any) -> None:
        super().__init__(message)
        self.classes = classes
        self.example = example
