"""The messages of the control plane: the protocol between a worker and the coordinator.

    worker                                        coordinator
    hello, described                 ---->        refuse, start
    built, ready                     ---->        join, go
    done, written, heartbeat         ---->        work (stage 0 only), alive
    failed, stop_requested           ---->        abort
    left                             ---->        close
    closed                           ---->        (and the worker leaves)
    free                             <--->        regroup

Each travels as a map with "type", and these classes are its exact shape: an unknown key or another type is no message.
Only the hello says who sends it; afterwards the connection does. Of a checkpoint a stage says "done" when it has
copied its state, and "written" when its part is on disk.

Workers that train together are a group. When one is lost, comes or goes, the others hear "regroup", leave each other
and say "free", and a new group starts; "group" is its number, so that what was said in an earlier one is not mistaken.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from scpl_dist import __version__
from scpl_dist.control.fields import Count, Duration, Flag, Name, Number, Positive, Shape, Text
from scpl_dist.control.items import Item
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase

PROTOCOL = 6  # version of the messages; both ends must have the same
VERSION = __version__  # all processes of a run must have the same


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
    blocks: dict[Name, Duration] = field(default_factory=dict)  # of training, by block
    bytes_to: dict[Name, Count] = field(default_factory=dict)  # those sent, by rank
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
    code: Text = ""  # digest of the user's files that the configuration names
    rank: Count | None = None  # that it was started for; None takes any place
    log: Text = ""  # name of its log in the run folder, if it has one there
    host: Name
    pid: Count
    device: Name
    endpoint: dict[Name, Any] = field(default_factory=dict)  # of `scpl_dist.transport.reachability`


class Described(Message):
    type: Literal["described"] = "described"
    data: Dataset


class Built(Message):
    type: Literal["built"] = "built"
    group: Count = 0
    blocks: list[Count] = field(default_factory=list)  # that it holds


class Ready(Message):
    type: Literal["ready"] = "ready"
    group: Count = 0


class Done(Message):
    type: Literal["done"] = "done"
    group: Count = 0
    sequence: Count
    losses: dict[Name, dict[Name, Number]] = field(default_factory=dict)  # of a step: terms by block
    # Of an evaluation, where the stage knows the answers: sum and count by name, see `scpl_dist.run.scores`.
    metrics: dict[Name, tuple[Count | Number | list[Count], Count | Number]] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)


class Written(Message):
    type: Literal["written"] = "written"
    group: Count = 0
    sequence: Count
    files: list[File]
    seconds: Duration


class Heartbeat(Message):
    type: Literal["heartbeat"] = "heartbeat"
    group: Count = 0
    phase: Phase
    step: Count = 0
    epoch: Count = 0
    micro_batch: Count | None = None
    stats: Stats = field(default_factory=Stats)
    clock: Number | None = None  # monotonic seconds of its host, now
    lag: Number | None = None  # by which that was ahead of the latest `Alive` when it came


class Failed(Message):
    type: Literal["failed"] = "failed"
    group: Count = 0
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
    group: Count = 0


class Free(Message):
    """It has left its group, and can be part of the next one."""

    type: Literal["free"] = "free"
    group: Count
    endpoint: dict[Name, Any] = field(default_factory=dict)  # where the others meet it next


class Drain(Message):
    """Of the command ``scpl-dist drain``, which is no worker: take a worker out."""

    type: Literal["drain"] = "drain"
    stage: Count
    replica: Count = 0


class Refuse(Message):
    type: Literal["refuse"] = "refuse"
    reason: Text


class Start(Message):
    type: Literal["start"] = "start"
    group: Count = 0
    generation: Text  # of the coordinator's start
    rank: Count  # of this worker in the group
    replicas: list[Positive]  # workers of each stage
    partition: list[Positive] = field(default_factory=list)  # blocks of each stage; none is as configured
    data: Dataset
    restore: Text = ""  # folder of the checkpoint to go on from
    folder: Text = ""  # run folder of the coordinator, for workers that were given none
    endpoints: list[dict[Name, Any]] = field(default_factory=list)  # by rank


class Join(Message):
    """All are alive and have built their blocks: connect to each other."""

    type: Literal["join"] = "join"


class Regroup(Message):
    type: Literal["regroup"] = "regroup"
    reason: Text


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
    clock: Number | None = None  # monotonic seconds of the coordinator, now


class Close(Message):
    type: Literal["close"] = "close"


class Closed(Message):
    """The last word of a worker: it has heard that it may leave."""

    type: Literal["closed"] = "closed"


FromWorker = (
    Hello
    | Described
    | Built
    | Ready
    | Done
    | Written
    | Heartbeat
    | Failed
    | StopRequested
    | Left
    | Closed
    | Free
    | Drain
)
FromCoordinator = Refuse | Start | Join | Go | Work | Abort | Alive | Close | Regroup
AnyMessage = Annotated[FromWorker | FromCoordinator, Field(discriminator="type")]
