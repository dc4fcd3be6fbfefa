"""What a model is trained for: the labels of a sample, the head that scores them, and how scores are judged.

classification   one class a sample
lm               the next token at every position of a text

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
from scpl_dist.methods.heads import NORM, Predictor, feature
from scpl_dist.methods.metrics import Metric
from scpl_dist.run.config import TaskSettings
from scpl_dist.run.scores import PERPLEXITY, Sum

IGNORED = -100  # label of a token that nobody shall guess, as torch has it
COMPARED = 512  # tokens that a contrastive loss compares with each other


class Task(ABC):
    """A task whose scores tell ``classes`` classes apart."""

    label_dimensions: ClassVar[int]  # of the labels of one sample; labels are int64, sample first
    per_token: ClassVar[bool] = False  # heads answer for each token; see `scpl_dist.methods.heads`
    classifier: ClassVar[str] = "sigmoid,512"  # kind of a local classifier, where a block has no preference

    def __init__(
        self, classes: int, settings: TaskSettings | None = None, counts: Sequence[int] = ()
    ) -> None:
        settings = settings or TaskSettings()
        self.classes = classes
        self._smoothing = settings.label_smoothing
        self._metrics = metrics.find(settings.metrics, classes)

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

    def compared(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a loss that compares samples sees, features (N, D) and classes (N,), of what a projector gives.

        A class may be `IGNORED`: that row belongs to nothing. `labelled` leaves such rows out.
        """
        return features, labels

    def counted(self, labels: Tensor) -> int:
        """What the loss is a mean over, as the weight of a part of a batch."""
        return len(labels)


class Classification(Task):
    """One class a sample: scores (N, classes), labels (N,).

    `counts` are the samples of each class in the training part, for ``task.class_weights = "balanced"``; without them
    classes have no weights. ValueError: settings that do not fit the number of classes.
    """

    label_dimensions = 0

    def __init__(
        self, classes: int, settings: TaskSettings | None = None, counts: Sequence[int] = ()
    ) -> None:
        super().__init__(classes, settings, counts)
        self._weights = _weights(settings or TaskSettings(), classes, counts)

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


class LanguageModelling(Task):
    """The next token at every position: scores (N, length, classes), labels (N, length), -100 where there is none.

    Tokens may also stand in one row, without the sample: scores (N, classes), labels (N,).
    """

    label_dimensions = 1
    per_token = True
    classifier = NORM

    def __init__(
        self, classes: int, settings: TaskSettings | None = None, counts: Sequence[int] = ()
    ) -> None:
        super().__init__(classes, settings, counts)
        self._halves = settings is not None and settings.compared == "halves"

    def head(self, block: nn.Module, output: Any, kind: str | None = None) -> nn.Module:
        features = feature(block, output)
        if features.dim() != 3:
            raise ValueError(
                f'task.name = "lm": {type(block).__name__} gives a feature of shape {tuple(features.shape)}, and a '
                "head for tokens reads (batch, length, width); use a model that keeps its tokens apart, such as gpt"
            )
        if kind is None and not hasattr(block, "predictor"):
            kind = self.classifier
        return Predictor(block, output, self.classes, kind, per_token=True)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self._cross_entropy(scores, labels, "mean", self._smoothing)

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, Metric]:
        """With "perplexity", whose sum is that of the logarithm; see `scpl_dist.run.scores`."""
        there = labels != IGNORED
        scores, labels = scores[there].float(), labels[there]
        number, right = len(labels), (scores.argmax(-1) == labels).sum()
        surprise = self._cross_entropy(scores, labels, "sum")
        total = self._cross_entropy(scores, labels, "sum", self._smoothing) if self._smoothing else surprise
        found: dict[str, Metric] = {"accuracy": (right, number), "loss": (total, number)}
        found[PERPLEXITY] = (surprise, number)
        return found | {name: metric(scores, labels) for name, metric in self._metrics.items()}

    def compared(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the batch in even steps, at most `COMPARED`; the class of a token is the next one.

        The labels say with which of them to begin: that is another one in every batch, and the same one on all workers.
        Or the two halves of each text, means over their tokens; the class is then the text's place in the batch.
        """
        if self._halves:
            return _halves(features, labels)
        classes = labels.flatten()
        step = max(1, len(classes) // COMPARED)
        number = min(COMPARED, len(classes))
        chosen = torch.arange(number, device=classes.device) * step + classes.sum() % step
        return features.flatten(0, 1)[chosen], classes[chosen]

    def counted(self, labels: Tensor) -> int:
        return int((labels != IGNORED).sum())

    def _cross_entropy(
        self, scores: Tensor, labels: Tensor, reduction: str, smoothing: float = 0.0
    ) -> Tensor:
        return functional.cross_entropy(
            scores.reshape(-1, self.classes),
            labels.reshape(-1),
            ignore_index=IGNORED,
            reduction=reduction,
            label_smoothing=smoothing,
        )


def labelled(features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (N, D) whose class is not `IGNORED`; waits for a GPU, which alone knows how many these are."""
    there = classes != IGNORED
    return features[there], classes[there]


def _halves(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, length, D): (2 N, D), first and second halves of the texts, and to which text each belongs."""
    there = (labels != IGNORED).unsqueeze(-1)
    middle = labels.shape[1] // 2
    parts = [
        (features[:, half] * there[:, half], there[:, half]) for half in (slice(middle), slice(middle, None))
    ]
    means = [tokens.sum(1) / known.sum(1).clamp(min=1) for tokens, known in parts]
    return torch.cat(means), torch.arange(len(labels), device=labels.device).repeat(2)


TASKS: dict[str, type[Classification | LanguageModelling]] = {
    "classification": Classification,
    "lm": LanguageModelling,
}


def make(settings: TaskSettings, classes: int, counts: Sequence[int] = ()) -> Task:
    """The task of a run; see `Classification` for `counts`."""
    return TASKS[settings.name](classes, settings, counts)


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
