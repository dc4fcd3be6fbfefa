"""The messages of the control plane: the protocol between a worker and the coordinator.

    worker                                        coordinator
    hello, described, ready, left    ---->        refuse, start, go, close
    done, written, heartbeat         ---->        work (stage 0 only), alive
    failed, stop_requested           ---->        abort

Each travels as a map with "type", and these classes are its exact shape: an unknown key or another type is no message.
Only the hello says who sends it; afterwards the connection does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from scpl_dist.control.fields import Count, Duration, Flag, Name, Number, Positive, Shape, Text
from scpl_dist.control.items import Item
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase

PROTOCOL = 3
"""Version of the messages; both ends must have the same."""
VERSION = version("scpl_dist")
"""Version of this package; all processes of a run must have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    begun: Annotated[int, Field(strict=True, ge=-1)] = -1
    """Sequence number of the item that the stage began last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File(Shape):
    """A part of a checkpoint that a stage wrote."""

    name: Name
    bytes: Count
    sha256: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(Shape):
    """What stage 0 knows about the data; the coordinator schedules from the sizes."""

    classes: Positive
    sizes: dict[Name, Count]
    input: Any = None


class Message(Shape):
    """Base of the messages."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """A worker exists and says what it is made of; another version's may have more, and is refused."""

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
    endpoint: dict[Name, Any] = field(default_factory=dict)
    """How the other workers reach this one; see `scpl_dist.transport.reachability`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described(Message):
    """Stage 0 has read the data set; its hello does not wait for that."""

    type: Literal["described"] = "described"
    data: Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Message):
    """The stage's blocks are built and its neighbours are connected."""

    type: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """The stage has finished an item."""

    type: Literal["done"] = "done"
    sequence: Count
    losses: dict[Name, dict[Name, Number]] = field(default_factory=dict)
    """Terms by block, of a step."""
    correct: Count | None = None
    """Right answers of an evaluation, where the stage knows them, of `total`."""
    total: Count | None = None
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written(Message):
    """The stage's part of a checkpoint is on disk; its ``done`` came when the state was copied."""

    type: Literal["written"] = "written"
    sequence: Count
    files: list[File]
    seconds: Duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """The worker's control thread lives; the counters are those of its training loop."""

    type: Literal["heartbeat"] = "heartbeat"
    phase: Phase
    step: Count = 0
    epoch: Count = 0
    micro_batch: Count | None = None
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """The worker cannot go on."""

    type: Literal["failed"] = "failed"
    cause: Cause
    message: Text
    traceback: Text = ""
    phase: Phase = Phase.STARTING
    step: Count = 0
    micro_batch: Count | None = None
    peer: Count | None = None
    """Rank of the worker whose connection broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested(Message):
    """The worker got a signal that asks for a graceful stop."""

    type: Literal["stop_requested"] = "stop_requested"
    signal: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(Message):
    """The stage has handled the stop item and is about to exit."""

    type: Literal["left"] = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Message):
    """The coordinator does not take this worker."""

    type: Literal["refuse"] = "refuse"
    reason: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Start(Message):
    """All workers are there: connect to the neighbours and build the blocks."""

    type: Literal["start"] = "start"
    generation: Text
    data: Dataset
    restore: Text = ""
    """Folder of the checkpoint to go on from."""
    folder: Text = ""
    """Run folder of the coordinator, for workers that were given none."""
    endpoints: list[dict[Name, Any]] = field(default_factory=list)
    """The endpoints of all workers, by rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Go(Message):
    """All stages are ready."""

    type: Literal["go"] = "go"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Message):
    """Items for stage 0, in order."""

    type: Literal["work"] = "work"
    items: list[Item]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort(Message):
    """End now."""

    type: Literal["abort"] = "abort"
    reason: Text
    stacks: Flag = False
    """Write the stacks of all threads into the log first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive(Message):
    """The coordinator lives."""

    type: Literal["alive"] = "alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Close(Message):
    """All stages have left: exit."""

    type: Literal["close"] = "close"


FromWorker = Hello | Described | Ready | Done | Written | Heartbeat | Failed | StopRequested | Left
FromCoordinator = Refuse | Start | Go | Work | Abort | Alive | Close
AnyMessage = Annotated[FromWorker | FromCoordinator, Field(discriminator="type")]
