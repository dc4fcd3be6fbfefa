from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import resolve
from scpl_dist.methods.task import Classification, plain
from scpl_dist.run.config import TaskSettings, load
from scpl_dist.run.scores import add, values


def test_metrics_of_parts_add_up_to_those_of_the_whole() -> None:
    task = Classification(7, TaskSettings(metrics=["top5", "confusion"]))
    scores, labels = torch.randn(11, 7), torch.arange(11) % 7
    whole = plain(task.metrics(scores, labels))
    assert whole.keys() == {"accuracy", "loss", "top5", "confusion"}
    right = sum(int(s.argmax()) == y for s, y in zip(scores, labels.tolist(), strict=True))
    assert whole["accuracy"] == (right, 11)
    assert whole["loss"] == pytest.approx((float(functional.cross_entropy(scores, labels)) * 11, 11))
    parts = add(plain(task.metrics(scores[a:b], labels[a:b])) for a, b in ((0, 3), (3, 11)))
    assert parts.pop("loss") == pytest.approx(whole.pop("loss"))
    assert parts == whole


def brier(scores: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    return (scores.softmax(1) - functional.one_hot(labels, scores.shape[1])).square().sum(), len(labels)


def loss(scores: Tensor, labels: Tensor) -> tuple[float, int]:
    return 1.0, 1


def a_number(scores: Tensor, labels: Tensor) -> float:
    return 1.0


def a_fault(scores: Tensor, labels: Tensor) -> int:
    return {0: 0}[len(labels)]


def test_a_metric_of_ones_own_is_called_as_its_function() -> None:
    task = Classification(3, TaskSettings(metrics=[f"{__name__}:brier"]))
    scores, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    assert plain(task.metrics(scores, labels))["brier"] == pytest.approx((4 * (4 / 9 + 2 / 9), 4))


@pytest.mark.parametrize(
    ("name", "classes", "problem"),
    [
        ("f2", 3, "task.metrics = 'f2': unknown; use one of top5, macro_f1, confusion"),
        ("top5", 5, '"top5" of 5 classes is always right; leave it out'),
        ("confusion", 257, 'with 257 classes is too large, at most 256; use "macro_f1"'),
        (f"{__name__}:loss", 3, "is called 'loss', which is taken; rename it"),
        (f"{__name__}:a_number", 3, r"returned 1.0; return \(sum, count\), two numbers"),
        (f"{__name__}:a_fault", 3, r"test_task.py, line \d+: KeyError: .*mend it there"),
    ],
)
def test_a_metric_that_cannot_be_is_named(name: str, classes: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Classification(classes, TaskSettings(metrics=[name]))


def test_class_weights_and_smoothing_are_those_of_torch_and_scikit_learn() -> None:
    scores, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    balanced = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy()))
    own = [1.0, 2.5, 0.5]
    for task, weights in (
        (Classification(3, TaskSettings(class_weights=own, label_smoothing=0.1)), torch.tensor(own)),
        (Classification(3, TaskSettings(class_weights="balanced", label_smoothing=0.1), [4, 2, 2]), balanced),
    ):
        wanted = functional.cross_entropy(scores, labels, weights.float(), label_smoothing=0.1)
        torch.testing.assert_close(task.loss(scores, labels), wanted, rtol=0, atol=0)
        parts = add(plain(task.metrics(scores[a:b], labels[a:b])) for a, b in ((0, 3), (3, 8)))
        assert values(parts, 3, [])["loss"] == pytest.approx(
            float(wanted)
        )  # also of batches with other weights


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"class_weights": [1.0, 2.0]}, r"task.class_weights = \[1.0, 2.0\]: 2 weights for 3 classes"),
        ({"class_weights": "balanced"}, "the training part has no sample of class 1"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Classification(3, TaskSettings(**settings), [3, 0, 5])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"run.method": "gpipe", "pipeline.micro_batches": 2, "task.class_weights": "balanced"},
            "task.class_weights = 'balanced' and pipeline.micro_batches = 2",
        ),
        (
            {"run.method": "al", "al.activation": "sigmoid", "task.label_smoothing": 0.1},
            'task.label_smoothing = 0.1 and al.activation = "sigmoid"',
        ),
    ],
)
def test_what_would_mean_something_else_is_refused(settings: dict[str, Any], problem: str) -> None:
    config = load(values=settings)
    with pytest.raises(ValueError, match=problem):
        resolve(config.run.method)(config, 4, Classification(3, config.task))


def test_head_loss_and_probabilities_fit_each_other() -> None:
    task, block, features = Classification(3), nn.Identity(), torch.randn(6, 5)
    scores = task.head(block, features)(features)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert scores.shape == (6, task.classes)
    torch.testing.assert_close(
        task.loss(scores, labels), functional.nll_loss(task.probabilities(scores).log(), labels)
    )
    assert labels.dim() == 1 + task.label_dimensions
