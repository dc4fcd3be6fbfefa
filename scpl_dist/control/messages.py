"""The messages of the control plane: the protocol between a worker and the coordinator.

    worker                                   coordinator
    hello, ready, left           ---->       refuse, start, go, close
    done, heartbeat              ---->       work (stage 0 only), alive
    failed, stop_requested       ---->       abort

Each is a map with "type", and these classes are its exact shape: an unknown key or another type is no message.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL = 2
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
    "sync",
    "send",
    "room",
    "data",
    "evaluate",
    "checkpoint",
    "idle",
]
WAITING = frozenset({"receive", "room", "sync", "idle"})
"""Phases in which a stage waits for others, so that it is not to blame for standing still."""

Cause = Literal["raised", "peer_lost", "nonfinite", "out_of_memory", "disk", "config", "network"]
Count = Annotated[int, Field(ge=0)]
Duration = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text: a name from the network must not steer a terminal."""
Item = dict[str, Any]
"""What a stage handles in one go; see `scpl_dist.coordinator.item_sequence` for the kinds and their keys."""


class Message(BaseModel):
    """Base of the messages: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: str


class Report(Message):
    """Base of what a worker says: which one it is."""

    stage: Count
    replica: Count = 0


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


class Hello(Report):
    """A worker exists and says what it is made of."""

    type: Literal["hello"] = "hello"
    protocol: int
    version: Name
    torch: Name
    config: Name
    stages: Count
    rank: Count
    host: Name
    pid: Count
    device: Name
    data: Dataset | None = None
    endpoint: dict[Name, Any] = Field(default_factory=dict)
    """How the other workers reach this one; see `scpl_dist.transport.reachability`."""


class Described(Report):
    """Stage 0 has read the data set; its hello does not wait for that."""

    type: Literal["described"] = "described"
    data: Dataset


class Ready(Report):
    """The stage's blocks are built and its neighbours are connected."""

    type: Literal["ready"] = "ready"
    blocks: Count | None = None
    """Blocks that the stage holds."""


class Done(Report):
    """The stage has finished an item."""

    type: Literal["done"] = "done"
    sequence: Count
    kind: Literal["train", "evaluate", "checkpoint", "epoch", "stop"]
    step: Count = 0
    epoch: Count = 0
    losses: dict[Name, dict[Name, float]] | None = None
    samples: Count = 0
    correct: Count | None = None
    total: Count | None = None
    split: Name | None = None
    stats: Stats = Stats()


class Written(Report):
    """The stage's part of a checkpoint is on disk; its ``done`` came when the state was copied."""

    type: Literal["written"] = "written"
    sequence: Count
    files: list[File]
    seconds: Duration


class Heartbeat(Report):
    """The worker's control thread lives; the counters are those of its training loop."""

    type: Literal["heartbeat"] = "heartbeat"
    phase: Phase
    step: Count = 0
    epoch: Count = 0
    micro_batch: Count | None = None
    stats: Stats = Stats()


class Failed(Report):
    """The worker cannot go on."""

    type: Literal["failed"] = "failed"
    cause: Cause
    message: str
    traceback: str = ""
    phase: Phase = "starting"
    step: Count = 0
    micro_batch: Count | None = None
    peer: Count | None = None
    """Rank of the worker whose connection broke."""


class StopRequested(Report):
    """The worker got a signal that asks for a graceful stop."""

    type: Literal["stop_requested"] = "stop_requested"
    signal: Annotated[int, Field(gt=0)]


class Left(Report):
    """The stage has handled the stop item and is about to exit."""

    type: Literal["left"] = "left"


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
    folder: str = ""
    """Run folder of the coordinator, for workers that were given none."""
    endpoints: list[dict[str, Any]] = Field(default_factory=list)
    """The endpoints of all workers, by rank."""


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
    stacks: bool = False
    """Write the stacks of all threads into the log first."""


class Alive(Message):
    """The coordinator lives."""

    type: Literal["alive"] = "alive"


class Close(Message):
    """All stages have left: exit."""

    type: Literal["close"] = "close"


MESSAGES: dict[str, type[Message]] = {
    model.model_fields["type"].default: model
    for model in (*Message.__subclasses__(), *Report.__subclasses__())
    if model is not Report
}
"""The classes by "type"."""
