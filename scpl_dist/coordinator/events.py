"""What the coordinator hears, and what it asks for.

Workers' messages reach it wrapped in `Received`, beside the few events that no worker sends. What it wants done
comes back as commands, which the service executes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.messages import Message
from scpl_dist.run.failures import Cause, Outcome


@dataclass(frozen=True, slots=True)
class Received:
    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Unreachable:
    peer: bytes  # its connection is gone
    message: Message  # that it will never hear


@dataclass(frozen=True, slots=True)
class Garbage:
    """A frame was no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Signal:
    source: str  # who got it: "launcher" or "coordinator"
    number: int


@dataclass(frozen=True, slots=True)
class Exited:
    rank: int  # of a worker, whose end the launcher saw
    code: int  # a negative one is the signal that killed it
    pid: int


@dataclass(frozen=True, slots=True)
class LauncherLost:
    """The launcher is gone."""


@dataclass(frozen=True, slots=True)
class Committed:
    step: int  # of a checkpoint that is visible on disk now
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class NotWritten:
    what: str  # "checkpoint" or the name of a file
    message: str
    cause: Cause = Cause.DISK


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Network = Received | Unreachable | Garbage | TurnedAway
Event = Network | Signal | Exited | LauncherLost | Committed | NotWritten | Tick


@dataclass(frozen=True, slots=True)
class Command:
    cause: int = field(default=0, kw_only=True)  # number of the event that caused it


@dataclass(frozen=True, slots=True)
class Send(Command):
    peers: tuple[bytes, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Record(Command):
    row: dict[str, Any]  # of metrics.jsonl; the service adds the time


@dataclass(frozen=True, slots=True)
class Say(Command):
    text: str
    # A live table makes all but warnings superfluous; of epochs that follow fast, the newest are enough.
    kind: Literal["progress", "epoch", "warning"] = "progress"


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
    step: int  # of a checkpoint whose parts nobody needs: it was written in case its epoch is the best
    unique: str


@dataclass(frozen=True, slots=True)
class Replace(Command):
    """Start a worker in place of one, and end that one if it still runs: for whoever started it."""

    rank: int  # that the lost one was started for
    pid: int | None  # None if it ended before anybody knew


@dataclass(frozen=True, slots=True)
class Rewind(Command):
    """Forget what comes after a cut: its steps are trained again."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Finish(Command):
    outcome: Outcome
    closing: tuple[bytes, ...] = ()  # who hears of it by "close", and answers
