"""Training methods: each a generator of actions for one stage, plus the objective of its units.

The executor knows none of them by name. A method is added by a file here and a line in `METHODS`.
"""

from __future__ import annotations

from scpl_dist.methods.al import AssociatedLearning
from scpl_dist.methods.base import Method
from scpl_dist.methods.bp import BackPropagation
from scpl_dist.methods.early_exit import EarlyExit
from scpl_dist.methods.gpipe import GPipe
from scpl_dist.methods.scpl import Scpl

__all__ = ["METHODS", "Method", "resolve"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Scpl, BackPropagation, EarlyExit, GPipe, AssociatedLearning)
}


def resolve(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"run.method = {name!r}: unknown method; use one of {', '.join(METHODS)}")
    return METHODS[name]
