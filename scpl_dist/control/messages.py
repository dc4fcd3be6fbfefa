"""The messages of the control plane: the protocol between a worker and the coordinator.

    worker                                        coordinator
    hello, described, ready, left    ---->        refuse, start, go, close
    done, written, heartbeat         ---->        work (stage 0 only), alive
    failed, stop_requested           ---->        abort

Each travels as a map with "type", and these classes are its exact shape: an unknown key or another type is no message.
Only the hello says who sends it; afterwards the connection does. Of a checkpoint a stage says "done" when it has
copied its state, and "written" when its part is on disk.
"""

from __future__ import annotations

from dataclasses import field
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from scpl_dist.control.fields import Count, Duration, Flag, Name, Number, Positive, Shape, Text
from scpl_dist.control.items import Item
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase

PROTOCOL = 4  # version of the messages; both ends must have the same
VERSION = version("scpl_dist")  # all processes of a run must have the same


class Stats(Shape):
    """Counters of a worker since its start: seconds, bytes, messages."""

    busy: Duration = 0.0
    waiting: Duration = 0.0
    blocked: Duration = 0.0
    queue: Count = 0
    bytes_sent: Count = 0
    bytes_received: Count = 0
    peak_memory: Count = 0
    phases: dict[Phase, Duration] = field(default_factory=dict)
    begun: Annotated[int, Field(strict=True, ge=-1)] = -1  # sequence number of the item begun last


class File(Shape):
    name: Name
    bytes: Count
    sha256: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]


class Dataset(Shape):
    classes: Positive
    sizes: dict[Name, Count]
    input: Any = None
    counts: list[Count] = field(default_factory=list)  # samples of each class, where the losses need them


class Message(Shape):
    """Base of the messages."""


class Hello(Message):
    # Another version's may have more: it must be understood to be refused.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    type: Literal["hello"] = "hello"
    protocol: Annotated[int, Field(strict=True)]
    version: Name
    torch: Name
    config: Name
    stage: Count
    replica: Count = 0
    stages: Count
    rank: Count
    host: Name
    pid: Count
    device: Name
    endpoint: dict[Name, Any] = field(default_factory=dict)  # of `scpl_dist.transport.reachability`


class Described(Message):
    type: Literal["described"] = "described"
    data: Dataset


class Ready(Message):
    type: Literal["ready"] = "ready"


class Done(Message):
    type: Literal["done"] = "done"
    sequence: Count
    losses: dict[Name, dict[Name, Number]] = field(default_factory=dict)  # of a step: terms by block
    # Of an evaluation, where the stage knows the answers: sum and count by name, see `scpl_dist.run.scores`.
    metrics: dict[Name, tuple[Count | Number | list[Count], Count | Number]] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)


class Written(Message):
    type: Literal["written"] = "written"
    sequence: Count
    files: list[File]
    seconds: Duration


class Heartbeat(Message):
    type: Literal["heartbeat"] = "heartbeat"
    phase: Phase
    step: Count = 0
    epoch: Count = 0
    micro_batch: Count | None = None
    stats: Stats = field(default_factory=Stats)


class Failed(Message):
    type: Literal["failed"] = "failed"
    cause: Cause
    message: Text
    traceback: Text = ""
    phase: Phase = Phase.STARTING
    step: Count = 0
    micro_batch: Count | None = None
    peer: Count | None = None  # rank of the worker whose connection broke


class StopRequested(Message):
    type: Literal["stop_requested"] = "stop_requested"
    signal: Positive


class Left(Message):
    type: Literal["left"] = "left"


class Refuse(Message):
    type: Literal["refuse"] = "refuse"
    reason: Text


class Start(Message):
    type: Literal["start"] = "start"
    generation: Text
    data: Dataset
    restore: Text = ""  # folder of the checkpoint to go on from
    folder: Text = ""  # run folder of the coordinator, for workers that were given none
    endpoints: list[dict[Name, Any]] = field(default_factory=list)  # by rank


class Go(Message):
    type: Literal["go"] = "go"


class Work(Message):
    type: Literal["work"] = "work"
    items: list[Item]


class Abort(Message):
    type: Literal["abort"] = "abort"
    reason: Text
    stacks: Flag = False  # write the stacks of all threads into the log first


class Alive(Message):
    type: Literal["alive"] = "alive"


class Close(Message):
    type: Literal["close"] = "close"


FromWorker = Hello | Described | Ready | Done | Written | Heartbeat | Failed | StopRequested | Left
FromCoordinator = Refuse | Start | Go | Work | Abort | Alive | Close
AnyMessage = Annotated[FromWorker | FromCoordinator, Field(discriminator="type")]
