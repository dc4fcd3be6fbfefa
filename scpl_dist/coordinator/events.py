"""What the coordinator hears, and what it asks for.

Workers' messages reach it wrapped in `Received`, beside the few events that no worker sends. What it wants done
comes back as commands, which the service executes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.messages import Message
from scpl_dist.run.failures import Outcome


@dataclass(frozen=True, slots=True)
class Received:
    """A message came from a peer of the control plane."""

    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A message could not be handed to this peer: its connection is gone."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class Garbage:
    """A frame was no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal asks for a stop; `source` says who got it: "launcher" or "coordinator"."""

    source: str
    number: int


@dataclass(frozen=True, slots=True)
class Exited:
    """The launcher saw a worker process end; a negative code is the signal that killed it."""

    rank: int
    code: int


@dataclass(frozen=True, slots=True)
class LauncherLost:
    """The launcher is gone."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint is visible on disk."""

    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class NotWritten:
    """A file of the run could not be written; `what` is "checkpoint" or a file name."""

    what: str
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Network = Received | Unreachable | Garbage | TurnedAway
Event = Network | Signal | Exited | LauncherLost | Committed | NotWritten | Tick


@dataclass(frozen=True, slots=True)
class Command:
    """Base of the commands."""

    cause: int = field(default=0, kw_only=True)
    """Number of the event that caused it."""


@dataclass(frozen=True, slots=True)
class Send(Command):
    """Send a message to these peers."""

    peers: tuple[bytes, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Record(Command):
    """Append a row to ``metrics.jsonl``; the service adds the time."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Say(Command):
    """Tell the user: "progress" lines replace a live table, "warning" lines are shown always."""

    text: str
    kind: Literal["progress", "warning"] = "progress"


def warning(text: str, stage: int | None = None) -> list[Command]:
    """Tell the user now, and whoever reads the metrics later."""
    return [Say(text, "warning"), Record({"event": "warning", "stage": stage, "text": text})]


@dataclass(frozen=True, slots=True)
class Commit(Command):
    """All stages wrote their parts of a checkpoint: publish it."""

    step: int
    epoch: int
    position: dict[str, Any]
    files: list[dict[str, Any]] = field(default_factory=list)
    best: bool = False
    seconds: float = 0.0
    unique: str = ""
    due: bool = True


@dataclass(frozen=True, slots=True)
class Discard(Command):
    """Nobody needs the parts of this checkpoint: it was written in case its epoch is the best."""

    step: int
    unique: str


@dataclass(frozen=True, slots=True)
class Finish(Command):
    """The run is over."""

    outcome: Outcome
