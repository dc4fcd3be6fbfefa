"""Metrics of class scores by name, ``task.metrics``; each a sum and a count, so that batches and workers add up.

top5         share of samples whose class is among the five with the highest scores
macro_f1     mean F1 of all classes
confusion    a matrix: samples by label (rows) and answer (columns)
your own     ``file.py:name``, ``package.module:name`` or an entry point in the group ``scpl_dist.metrics``:
             ``name(scores (N, classes), labels (N,)) -> (sum, count)``; the metric is called `name`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scpl_dist.run.imports import blaming
from scpl_dist.run.registry import Registry
from scpl_dist.run.scores import CONFUSION, MACRO_F1

# A sum and a count: scalars, which are added, or a vector (N,) of cells of the confusion matrix, which are joined.
Metric = tuple[Tensor | float, Tensor | float]
Function = Callable[[Tensor, Tensor], Metric]

METRICS = Registry(
    "metrics",
    "task.metrics",
    {name: f"scpl_dist.methods.metrics:{name}" for name in ("top5", MACRO_F1, CONFUSION)},
)
_TAKEN = (
    "event",
    "epoch",
    "split",
    "accuracy",
    "correct",
    "total",
    "loss",
    "perplexity",
    "time",
    "event_number",
)
_MANY = 256  # classes; a larger matrix is no row that anybody reads


def find(names: Iterable[str], classes: int) -> dict[str, Function]:
    """Functions by what they are called; ValueError for a name that is none or means nothing with these classes."""
    found: dict[str, Function] = {}
    for name in names:
        function = METRICS.find(name)
        if name == "top5" and classes < 6:
            raise ValueError(f'task.metrics: "top5" of {classes} classes is always right; leave it out')
        if name == CONFUSION and classes > _MANY:
            raise ValueError(
                f'task.metrics: "confusion" with {classes} classes is too large, at most {_MANY}; use "{MACRO_F1}"'
            )
        short = name.rpartition(":")[2]
        if name not in METRICS.builtin:
            if short in (*_TAKEN, *METRICS.builtin, *found):
                raise ValueError(f"task.metrics: {name!r} is called {short!r}, which is taken; rename it")
            function = _own(name, function, classes)
        found[CONFUSION if name == MACRO_F1 else short] = function
    return found


def top5(scores: Tensor, labels: Tensor) -> Metric:
    return (scores.topk(5).indices == labels.unsqueeze(1)).sum(), len(labels)


def confusion(scores: Tensor, labels: Tensor) -> Metric:
    return labels * scores.shape[1] + scores.argmax(1), len(labels)


macro_f1 = confusion  # is made of the same cells


def _own(name: str, function: Callable[..., Any], classes: int) -> Function:
    """The user's function, which has been tried once on two samples."""

    def checked(scores: Tensor, labels: Tensor) -> Metric:
        returned = function(scores, labels)
        try:
            total, count = returned
            return float(total), float(count)
        except (TypeError, ValueError, RuntimeError):
            fix = "return (sum, count), two numbers or tensors of one each"
            raise ValueError(f"task.metrics = {name!r}: returned {returned!r:.100}; {fix}") from None

    with blaming("task.metrics", name):
        checked(torch.arange(2.0 * classes).reshape(2, classes), torch.tensor([0, classes - 1]))
    return checked
