"""Metrics from sums, against scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from scpl_dist.run.scores import add, values


@pytest.mark.parametrize("classes", [4, 9])  # the higher ones are neither a label nor an answer
def test_the_matrix_and_its_f1_are_those_of_scikit_learn(classes: int) -> None:
    generator = np.random.default_rng(0)
    labels, answers = generator.integers(0, 4, (2, 200))
    cells = (labels * classes + answers).tolist()
    sums = add([{"confusion": (cells[:90], 90)}, {"confusion": (cells[90:], 110)}])
    found = values(sums, classes, ["macro_f1", "confusion"])
    assert found["confusion"] == sklearn.confusion_matrix(labels, answers, labels=range(classes)).tolist()
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, answers, average="macro"))
    assert values(sums, classes, ["macro_f1"]).keys() == {"macro_f1"}


def test_sums_are_added_in_order_and_what_is_not_finite_has_no_value() -> None:
    sums = add([{"loss": (0.1, 1), "accuracy": (1, 2)}, {"loss": (0.2, 1)}, {"loss": (0.3, 1)}])
    assert sums == {"loss": ((0.1 + 0.2) + 0.3, 3), "accuracy": (1, 2)}
    assert values({"loss": (math.nan, 3)}, 2, []) == {"loss": None}
