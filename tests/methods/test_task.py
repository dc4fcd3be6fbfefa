from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scpl_dist.methods.task import Classification


def test_metrics_of_parts_add_up_to_those_of_the_whole() -> None:
    task = Classification(4)
    scores, labels = torch.randn(11, 4), torch.arange(11) % 4
    [(name, (right, count))] = task.metrics(scores, labels).items()
    assert name == "accuracy"
    assert (int(right), count) == (
        sum(int(s.argmax()) == y for s, y in zip(scores, labels.tolist(), strict=True)),
        11,
    )
    parts = [task.metrics(scores[a:b], labels[a:b])["accuracy"] for a, b in ((0, 3), (3, 11))]
    assert (sum(int(right) for right, _ in parts), sum(count for _, count in parts)) == (int(right), count)


def test_head_loss_and_probabilities_fit_each_other() -> None:
    task, block, features = Classification(3), nn.Identity(), torch.randn(6, 5)
    scores = task.head(block, features)(features)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert scores.shape == (6, task.classes)
    torch.testing.assert_close(
        task.loss(scores, labels), functional.nll_loss(task.probabilities(scores).log(), labels)
    )
    assert labels.shape[1:] == task.label_shape
