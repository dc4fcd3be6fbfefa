"""Metrics of a part of the data, from sums over its samples that may have been taken in parts, anywhere.

What adds up travels as a pair of a sum and a count, such as (right answers, samples); their quotient is the metric. The
confusion matrix is the one sum that is a list: of every sample its cell, ``label * classes + answer``. Perplexity
travels as its logarithm, which has a mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Sum = tuple[float | list[int], float]
CONFUSION, MACRO_F1, PERPLEXITY = "confusion", "macro_f1", "perplexity"
FALLING = ("loss", PERPLEXITY)  # the lower the better

_OVERFLOW = 700  # of the exponential function


def add(parts: Iterable[Mapping[str, Sum]]) -> dict[str, Sum]:
    """The sums of all parts, added in their order, so that those of floats do not depend on anything else."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, (value, count) in part.items():
            before, counted = total.get(name, (0 if isinstance(value, int | float) else [], 0))
            total[name] = before + value, counted + count
    return total


def values(sums: Mapping[str, Sum], classes: int, wanted: Collection[str]) -> dict[str, Any]:
    """Metrics by name; a matrix is a list of rows, one a label. None stands for what is NaN or infinite."""
    found: dict[str, Any] = {}
    for name, (total, count) in sums.items():
        if isinstance(total, list):
            cells = Counter(total)
            if CONFUSION in wanted:
                found[name] = [
                    [cells[row * classes + column] for column in range(classes)] for row in range(classes)
                ]
            if MACRO_F1 in wanted:
                found[MACRO_F1] = macro_f1(cells, classes)
        else:
            value = total / count if count else 0.0
            if name == PERPLEXITY:
                value = math.exp(value) if value < _OVERFLOW else math.inf
            found[name] = value if math.isfinite(value) else None
    return found


def macro_f1(cells: Mapping[int, int], classes: int) -> float:
    """Mean of the F1 of all classes that are a label or an answer at least once; `cells` counts label and answer."""
    labels, answers = Counter[int](), Counter[int]()
    for cell, count in cells.items():
        labels[cell // classes] += count
        answers[cell % classes] += count
    there = labels.keys() | answers.keys()
    right = {name: cells.get(name * (classes + 1), 0) for name in there}
    return math.fsum(2 * right[name] / (labels[name] + answers[name]) for name in there) / max(1, len(there))
