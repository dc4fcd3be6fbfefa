"""Metrics of an evaluation: the same numbers for any number of stages, and those of scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics as sklearn
from torch.nn import functional

from scpl_dist import data
from scpl_dist.run.config import load
from tests.support import in_threads

NAMES = ["top5", "macro_f1", "confusion"]


def run(stages: int, method: str = "scpl") -> in_threads.Run:
    settings = {"run.epochs": 1, "data.batch_size": 256, "data.augmentation": "none"}
    named = {"run.method": method, "pipeline.stages": stages, "task.metrics": NAMES}
    return in_threads.Run(load(values=settings | named))


def test_metrics_do_not_depend_on_the_stages_and_are_those_of_scikit_learn() -> None:
    whole = run(1)
    (found,) = whole.result.metrics
    assert run(3).result.metrics == [found]
    source = data.resolve(whole.config)
    inputs, labels = source.batch("test", 0, torch.arange(source.sizes["test"]))
    with torch.no_grad():
        for trainable in whole.result.trainables.values():
            inputs = trainable.eval()(inputs)
        scores = trainable.predict(inputs)
    answers = scores.argmax(1)
    assert found["confusion"] == sklearn.confusion_matrix(labels, answers).tolist()
    assert {name: value for name, value in found.items() if name != "confusion"} == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, answers),
            "loss": float(functional.cross_entropy(scores, labels)),
            "top5": sklearn.top_k_accuracy_score(labels, scores, k=5),
            "macro_f1": sklearn.f1_score(labels, answers, average="macro"),
        },
        rel=1e-5,
    )


def test_associated_learning_has_no_loss_of_its_answers() -> None:
    (found,) = run(2, "al").result.metrics
    assert found.keys() == {"accuracy", *NAMES}
