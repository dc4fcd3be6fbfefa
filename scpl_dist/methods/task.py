"""What a model is trained for: the labels of a sample, the head that scores them, and how scores are judged.

Methods decide what a block learns from and when; what a right answer is, they leave to the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods.heads import Predictor


class Task(ABC):
    """A task whose scores tell ``classes`` classes apart."""

    label_shape: ClassVar[tuple[int, ...]]  # of the labels of one sample; labels are int64, sample first

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @abstractmethod
    def head(self, block: nn.Module, output: Any, kind: str | None = None) -> nn.Module:
        """A module from the feature of `block` (see `scpl_dist.methods.heads`) to scores.

        Of the output of `block`, a pytree of tensors, only shapes are read. No kind is the block's own preference; an
        unknown one raises ValueError.
        """

    @abstractmethod
    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """What is minimised: a scalar, the mean over what is labelled."""

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores as probabilities of the classes, of the same shape."""

    @abstractmethod
    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Metrics by name, each as a sum (a scalar) and the number of what it counts: parts are added up."""


class Classification(Task):
    """One class a sample: scores (N, classes), labels (N,)."""

    label_shape = ()

    def head(self, block: nn.Module, output: Any, kind: str | None = None) -> nn.Module:
        return Predictor(block, output, self.classes, kind)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores, labels)

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((scores.argmax(1) == labels).sum(), len(labels))}
