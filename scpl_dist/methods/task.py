"""What a model is trained for: the labels of a sample, the head that scores them, and how scores are judged.

Methods decide what a block learns from and when; what a right answer is, they leave to the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import metrics
from scpl_dist.methods.heads import Predictor
from scpl_dist.methods.metrics import Metric
from scpl_dist.run.config import TaskSettings
from scpl_dist.run.scores import Sum


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
    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, Metric]:
        """Metrics by name, each as a sum and the number of what it counts: parts are added up.

        "accuracy" and "loss", what is minimised, are always there.
        """


class Classification(Task):
    """One class a sample: scores (N, classes), labels (N,).

    `counts` are the samples of each class in the training part, for ``task.class_weights = "balanced"``; without them
    classes have no weights. ValueError: settings that do not fit the number of classes.
    """

    label_shape = ()

    def __init__(
        self, classes: int, settings: TaskSettings | None = None, counts: Sequence[int] = ()
    ) -> None:
        super().__init__(classes)
        settings = settings or TaskSettings()
        self._smoothing = settings.label_smoothing
        self._weights = _weights(settings, classes, counts)
        self._metrics = metrics.find(settings.metrics, classes)

    def head(self, block: nn.Module, output: Any, kind: str | None = None) -> nn.Module:
        return Predictor(block, output, self.classes, kind)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self._cross_entropy(scores, labels, "mean")

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, Metric]:
        total = self._cross_entropy(scores.float(), labels, "sum")
        weight = len(labels) if self._weights is None else self._weights[labels].sum()
        right = (scores.argmax(1) == labels).sum()
        found: dict[str, Metric] = {"accuracy": (right, len(labels)), "loss": (total, weight)}
        return found | {name: metric(scores, labels) for name, metric in self._metrics.items()}

    def _cross_entropy(self, scores: Tensor, labels: Tensor, reduction: str) -> Tensor:
        weights = None
        if self._weights is not None:
            self._weights = self._weights.to(scores.device)
            weights = self._weights.to(scores.dtype)
        return functional.cross_entropy(
            scores, labels, weights, reduction=reduction, label_smoothing=self._smoothing
        )


def _weights(settings: TaskSettings, classes: int, counts: Sequence[int]) -> Tensor | None:
    given = settings.class_weights
    if given == "none" or (given == "balanced" and not counts):
        return None
    if given == "balanced":
        absent = [name for name, count in enumerate(counts) if count == 0]
        if absent:
            raise ValueError(
                f'task.class_weights = "balanced": the training part has no sample of class {absent[0]}; '
                "give a list of weights, or leave the class out of the data set"
            )
        return torch.tensor([sum(counts) / (classes * count) for count in counts])
    if len(given) != classes:
        raise ValueError(
            f"task.class_weights = {given}: {len(given)} weights for {classes} classes; give one for each class"
        )
    return torch.tensor(given)


def plain(found: Mapping[str, Metric]) -> dict[str, Sum]:
    """Metrics as plain numbers, which travel; waits for a GPU."""
    return {name: (_number(total), _number(count)) for name, (total, count) in found.items()}


def _number(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
