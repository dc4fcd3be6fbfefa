"""Why a run ends: the causes of failure, what each means for the user and for a restart, and how a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Cause(StrEnum):
    """What a failure came from, as exit.json calls it."""

    RAISED = "raised"
    NONFINITE = "nonfinite"
    OUT_OF_MEMORY = "out_of_memory"
    DISK = "disk"
    OPEN_FILES = "open_files"
    CONFIG = "config"
    NETWORK = "network"
    PEER_LOST = "peer_lost"  # of reports only: a worker misses another one, whose failure it is
    PROTOCOL = "protocol"
    MISSING = "missing"
    SILENT = "silent"
    HANG = "hang"
    DEADLOCK = "deadlock"
    DIED = "died"
    UNREACHABLE = "unreachable"
    CHECKPOINT = "checkpoint"
    COORDINATOR = "coordinator"
    COORDINATOR_LOST = "coordinator_lost"
    LAUNCHER_LOST = "launcher_lost"


@dataclass(frozen=True, slots=True)
class Meaning:
    advice: str = ""  # what the user can do, unless the place of the failure knows better
    final: str = ""  # why a restart cannot help; empty where it can
    stacks: bool = False  # whether the stacks of all workers tell more
    code: int = 1  # exit code of the run


_SILENT = "its process is stopped, its interpreter is blocked in native code, or its host is cut off"
_DEAD = "look into its log, and into the system's log for an out-of-memory kill; then resume"
MEANING: dict[str, Meaning] = {
    Cause.RAISED: Meaning("read the traceback: it comes from the model, the loss or the data of this stage"),
    Cause.NONFINITE: Meaning(
        "lower optimizer.lr, or check the data for NaN and Inf; the last checkpoint is unharmed",
        final="the same steps would be repeated exactly and come to the same loss",
    ),
    Cause.OUT_OF_MEMORY: Meaning(
        "lower data.batch_size or pipeline.max_in_flight, or give this stage fewer blocks"
    ),
    Cause.DISK: Meaning(
        "free some space, or choose another --run-dir (runtime.offload_folder for blocks that are away), then "
        "resume; the last checkpoint is unharmed"
    ),
    Cause.OPEN_FILES: Meaning(
        "raise the limit of open files (ulimit -Hn), or look who connects to the run's ports (ss -tnp), then resume"
    ),
    Cause.CONFIG: Meaning(
        "correct the configuration: all processes need the same",
        final="the configuration must be corrected first",
        code=2,
    ),
    Cause.NETWORK: Meaning("scpl-dist doctor CONFIG on each host shows its interfaces and what it can reach"),
    Cause.PEER_LOST: Meaning(_DEAD),
    Cause.PROTOCOL: Meaning(
        "resume the run; if its connections are sound, this is a bug of scpl_dist: please report it"
    ),
    Cause.MISSING: Meaning(
        "start all workers, and check that they reach the coordinator's address", stacks=True
    ),
    Cause.SILENT: Meaning(_SILENT, stacks=True),
    Cause.HANG: Meaning(
        "if this stage is only slow, raise runtime.timeout_s (runtime.first_step_timeout_s for a stage's first "
        "item); otherwise look at its stack in the log",
        stacks=True,
    ),
    Cause.DEADLOCK: Meaning(
        "a message between two stages was lost: check the network between their hosts, then resume",
        stacks=True,
    ),
    Cause.DIED: Meaning(_DEAD),
    Cause.UNREACHABLE: Meaning(f"{_SILENT}; {_DEAD}", stacks=True),
    Cause.CHECKPOINT: Meaning(
        "see to the file that is named, then resume: --resume auto takes the newest checkpoint that is whole",
        final="there is nothing to go on from",
    ),
    Cause.COORDINATOR: Meaning("this is a bug of scpl_dist: please report it, then resume the run"),
    Cause.COORDINATOR_LOST: Meaning(),
    Cause.LAUNCHER_LOST: Meaning("its process was killed: resume the run", final="nobody is there to do it"),
}


def meaning(cause: str) -> Meaning:
    """Of a cause in an exit.json, which may be empty or another version's."""
    return MEANING.get(cause, Meaning())


@dataclass(frozen=True, slots=True)
class Failure:
    cause: Cause
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
    log: str | None = None  # name of the worker's log


def failure(cause: Cause, message: str) -> Failure:
    """A failure of no particular worker, with the advice of its cause."""
    return Failure(cause, message, MEANING[cause].advice)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: with a failure or a result, unless it was stopped."""

    code: int
    reason: str
    failure: Failure | None = None
    result: dict[str, Any] | None = None
    survived: tuple[str, ...] = ()  # causes of the failures that this start has survived
    final: str = ""  # why nobody need try again, where that is not the cause's nature
