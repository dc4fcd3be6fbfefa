"""Why a run ends: the causes of failure, what each means for the user and for a restart, and how a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ADVICE = {
    "raised": "read the traceback: it comes from the model, the loss or the data of this stage",
    "nonfinite": "lower optimizer.lr, or check the data for NaN and Inf; the last checkpoint is unharmed",
    "out_of_memory": "lower data.batch_size or pipeline.max_in_flight, or give this stage fewer blocks",
    "disk": "free some space or choose another --run-dir, then resume; the last checkpoint is unharmed",
    "config": "correct the configuration: all processes need the same",
    "network": "scpl-dist doctor CONFIG on each host shows its interfaces and what it can reach",
    "protocol": "resume the run; if its connections are sound, this is a bug of scpl_dist: please report it",
    "launcher_lost": "its process was killed: resume the run",
}
"""What to do, by cause."""


UNCLEAR = frozenset({"hang", "silent", "deadlock", "missing", "unreachable"})
"""Causes for which the stacks of all workers tell more."""

FINAL = {
    "config": "the configuration must be corrected first",
    "checkpoint": "there is nothing to go on from",
    "nonfinite": "the same steps would be repeated exactly and come to the same loss",
    "protocol": "it would happen again",
    "launcher_lost": "nobody is there to do it",
}
"""Causes that a restart cannot help against, and why."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended, and where."""

    cause: str
    message: str
    advice: str
    stage: int | None = None
    host: str | None = None
    rank: int | None = None
    pid: int | None = None
    phase: str | None = None
    step: int | None = None
    micro_batch: int | None = None
    traceback: str | None = None
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exit code, reason, and a failure or a result."""

    code: int
    reason: str
    failure: Failure | None = None
    result: dict[str, Any] | None = None
