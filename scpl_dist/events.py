"""What the coordinator hears, and what it asks for.

The messages are the protocol of the control plane: a worker and the coordinator exchange exactly these maps, and
`scpl_dist.control` refuses everything else. They reach the coordinator wrapped in `Received`, beside the few
events that no worker sends. What the coordinator wants done comes back as commands, which the service executes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "PROTOCOL",
    "VERSION",
    "WAITING",
    "Abort",
    "Alive",
    "Close",
    "Command",
    "Commit",
    "CommitFailed",
    "Committed",
    "Done",
    "Event",
    "Exited",
    "Failed",
    "Failure",
    "File",
    "Finish",
    "Garbage",
    "Go",
    "Heartbeat",
    "Hello",
    "LauncherLost",
    "Left",
    "Message",
    "Outcome",
    "Ready",
    "Received",
    "Record",
    "Refuse",
    "Say",
    "Send",
    "Signal",
    "Start",
    "Stats",
    "StopRequested",
    "Tick",
    "Unreachable",
    "Work",
]

PROTOCOL = 1
"""Version of the messages; both ends must have the same."""
VERSION = version("scpl_dist")
"""Version of this package; all processes of a run must have the same."""

Phase = Literal[
    "starting",
    "receive",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "send",
    "room",
    "data",
    "evaluate",
    "checkpoint",
    "idle",
]
WAITING = frozenset({"receive", "room", "idle"})
"""Phases in which a stage waits for others, so that it is not to blame for standing still."""

Cause = Literal["raised", "peer_lost", "nonfinite", "out_of_memory", "disk", "config"]
Count = Annotated[int, Field(ge=0)]
Duration = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=256)]
Item = dict[str, Any]
"""What a stage handles in one go; see `scpl_dist.agenda` for the kinds and their keys."""


class Message(BaseModel):
    """Base of the messages: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: str


class Stats(BaseModel):
    """Counters of a worker since its start: seconds, bytes, messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    busy: Duration = 0.0
    waiting: Duration = 0.0
    blocked: Duration = 0.0
    queue: Count = 0
    bytes_sent: Count = 0
    bytes_received: Count = 0
    peak_memory: Count = 0
    phases: dict[Name, Duration] = Field(default_factory=dict)
    begun: Annotated[int, Field(ge=-1)] = -1
    """Sequence number of the item that the stage began last."""


class File(BaseModel):
    """A part of a checkpoint that a stage wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Dataset(BaseModel):
    """What stage 0 knows about the data; the coordinator schedules from the sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    classes: Annotated[int, Field(gt=0)]
    sizes: dict[Name, Count]
    input: Any = None


class Hello(Message):
    """A worker exists and says what it is made of."""

    type: Literal["hello"] = "hello"
    protocol: int
    version: Name
    torch: Name
    config: Name
    stage: Count
    stages: Count
    rank: Count
    host: Name
    pid: Count
    device: Name
    data: Dataset | None = None


class Ready(Message):
    """The stage's blocks are built and its neighbours are connected."""

    type: Literal["ready"] = "ready"
    stage: Count
    blocks: Count | None = None
    """Blocks that the stage holds."""


class Done(Message):
    """The stage has finished an item."""

    type: Literal["done"] = "done"
    stage: Count
    sequence: Count
    kind: Literal["train", "evaluate", "checkpoint", "epoch", "stop"]
    step: Count = 0
    epoch: Count = 0
    losses: dict[Name, dict[Name, float]] | None = None
    samples: Count = 0
    correct: Count | None = None
    total: Count | None = None
    files: list[File] | None = None
    seconds: Duration | None = None
    split: Name | None = None
    stats: Stats = Stats()


class Heartbeat(Message):
    """The worker's control thread lives; the counters are those of its training loop."""

    type: Literal["heartbeat"] = "heartbeat"
    stage: Count
    phase: Phase
    step: Count = 0
    epoch: Count = 0
    micro_batch: Count | None = None
    stats: Stats = Stats()


class Failed(Message):
    """The worker cannot go on."""

    type: Literal["failed"] = "failed"
    stage: Count
    cause: Cause
    message: str
    traceback: str = ""
    phase: Phase = "starting"
    step: Count = 0
    micro_batch: Count | None = None
    peer: Count | None = None


class StopRequested(Message):
    """The worker got a signal that asks for a graceful stop."""

    type: Literal["stop_requested"] = "stop_requested"
    stage: Count
    signal: Annotated[int, Field(gt=0)]


class Left(Message):
    """The stage has handled the stop item and is about to exit."""

    type: Literal["left"] = "left"
    stage: Count


class Refuse(Message):
    """The coordinator does not take this worker."""

    type: Literal["refuse"] = "refuse"
    reason: str


class Start(Message):
    """All workers are there: connect to the neighbours and build the blocks."""

    type: Literal["start"] = "start"
    generation: str
    data: dict[str, Any]
    restore: dict[str, Any] | None = None


class Go(Message):
    """All stages are ready."""

    type: Literal["go"] = "go"


class Work(Message):
    """Items for stage 0, in order."""

    type: Literal["work"] = "work"
    items: list[Item]


class Abort(Message):
    """End now."""

    type: Literal["abort"] = "abort"
    reason: str


class Alive(Message):
    """The coordinator lives."""

    type: Literal["alive"] = "alive"


class Close(Message):
    """All stages have left: exit."""

    type: Literal["close"] = "close"


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
class CommitFailed:
    """A checkpoint could not be published."""

    step: int
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Received | Unreachable | Garbage | Signal | Exited | LauncherLost | Committed | CommitFailed | Tick


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exit code, reason, and a failure or a result."""

    code: int
    reason: str
    failure: Failure | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to these peers."""

    peers: tuple[bytes, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Record:
    """Append a row to ``metrics.jsonl``; the service adds the time."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the user: "progress" lines replace a live table, "warning" lines are shown always."""

    text: str
    kind: Literal["progress", "warning"] = "progress"


@dataclass(frozen=True, slots=True)
class Commit:
    """All stages wrote their parts of a checkpoint: publish it."""

    step: int
    epoch: int
    position: dict[str, Any]
    files: list[dict[str, Any]] = field(default_factory=list)
    best: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over."""

    outcome: Outcome


Command = Send | Record | Say | Commit | Finish
