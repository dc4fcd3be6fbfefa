"""Whether a run survives a failure: by a worker in place of the lost one, or by a new start of all.

A restart helps against what comes from outside: a killed process, a host that was cut off, a hang. It is no use
against what will come again, since a resumed run repeats every step exactly; then the cause must be shown instead
of being tried until the limit is used up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scpl_dist.run.failures import Cause, meaning

SAME = 3  # failures of one kind in a row, without progress between them, that are called a storm
RAISED = 2  # the same of what code has raised, which hardly comes from outside


@dataclass(frozen=True, slots=True)
class End:
    code: int
    cause: str  # as in ``exit.json``; "" without a failure
    reason: str
    stage: int | None = None
    step: int = -1  # the last one that all stages are known to have finished
    survived: tuple[str, ...] = ()  # causes of the failures that the start has survived
    final: str = ""  # why its coordinator would not try again

    @classmethod
    def of(cls, found: Mapping[str, Any], step: int) -> End:
        """What a coordinator has left as ``exit.json``."""
        survived, final = tuple(found.get("survived", ())), found.get("final", "")
        return cls(
            found["code"], found.get("cause", ""), found["reason"], found.get("stage"), step, survived, final
        )


@dataclass(slots=True)
class Restarts:
    """Decides about restarts; `limit` is ``runtime.max_restarts``."""

    limit: int
    causes: list[str] = field(default_factory=list)  # what ended the starts that were followed by another
    _previous: tuple[str, int | None] | None = None
    _furthest: int = -1
    _same: int = 0

    @property
    def left(self) -> int:
        return self.limit - len(self.causes)

    def refusal(self, end: End) -> str | None:
        """Why there is no restart after this end; None if there is one, which is then counted."""
        kind = (end.cause, end.stage)
        self._same = self._same + 1 if kind == self._previous and end.step <= self._furthest else 1
        self._previous = kind
        self._furthest = max(self._furthest, end.step)
        if end.code != 1:
            return "the run did not fail"
        self.causes += end.survived
        if end.final:
            return end.final
        if meaning(end.cause).final:
            return f"not started again: {meaning(end.cause).final}"
        if self._same >= (RAISED if end.cause == Cause.RAISED else SAME):
            place = f"step {self._furthest + 1} was done" if self._furthest >= 0 else "the first step"
            return (
                f"not started again: the same failure came {self._same} times in a row, each before {place}"
            )
        if self.left <= 0:
            return f"not started again: runtime.max_restarts = {self.limit} restarts are used up"
        self.causes.append(end.cause or "unknown")
        return None
