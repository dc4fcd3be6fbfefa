"""Training methods: each a generator of actions for one stage, plus the objective of its blocks.

The executor knows none of them by name. A method is a subclass of `Method`: built in, an entry point in the group
``scpl_dist.methods``, or the user's own, ``run.method = "path/to/file.py:Class"``.
"""

from __future__ import annotations

import inspect

from scpl_dist.methods.base import Method
from scpl_dist.run.registry import Registry

__all__ = ["METHODS", "Method", "resolve"]

METHODS = Registry(
    "methods",
    "run.method",
    {
        "scpl": "scpl_dist.methods.scpl:Scpl",
        "bp": "scpl_dist.methods.bp:BackPropagation",
        "early_exit": "scpl_dist.methods.scpl:EarlyExit",
        "gpipe": "scpl_dist.methods.gpipe:GPipe",
        "al": "scpl_dist.methods.al:AssociatedLearning",
    },
)


def resolve(name: str) -> type[Method]:
    """The method of this name; ValueError if there is none, or what there is is no method."""
    found = METHODS.find(name)
    if not isinstance(found, type) or not issubclass(found, Method):
        raise ValueError(f"run.method = {name!r}: give a subclass of scpl_dist.methods.Method")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"run.method = {name!r}: the class needs {missing}; see scpl_dist.methods.Method")
    return found
