"""Failures on purpose, so that every promise about failures can be tested on real processes.

The environment variable `VARIABLE` holds a JSON list of faults, see docs/reliability.md. Places of a worker are
"loading" before its data set, "joining" before it connects to the others, every change of phase, and "write" and
"written" around each part in the thread that writes a checkpoint; those of the coordinator are its state at every event
("gathering", "preparing", "running"), and "commit" and "committed" around publishing a checkpoint. A fault is noted in
``RUN/log/faults.jsonl`` before it happens: so often as it says and no more, restarts included.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, TypeAdapter, ValidationError

from scpl_dist.run.layout import WorkerId

VARIABLE = "SCPL_DIST_FAULTS"


class InjectedFault(RuntimeError):
    """Raised by a fault with the action "raise"."""


class Fault(BaseModel):
    """What happens to whom, and where: at the first matching place at or after `step`; with 0 `times` at each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["kill", "stop", "crash", "raise", "memory", "full", "hang", "delay", "hold"]
    role: Literal["worker", "coordinator"] = "worker"
    stage: int | None = None
    replica: int | None = None
    step: int | None = None
    phase: str | None = None
    seconds: NonNegativeFloat = 3600.0
    times: NonNegativeInt = 1


class Trap:
    """The faults of one process: none, unless the environment has some."""

    def __init__(self, role: str, worker: WorkerId | None, run_dir: Path) -> None:
        try:
            faults = TypeAdapter(list[Fault]).validate_json(os.environ.get(VARIABLE) or "[]")
        except ValidationError as error:
            raise ValueError(f"{VARIABLE}: not a list of faults: {error}") from None
        stage, replica = (worker.stage, worker.replica) if worker else (None, None)
        self._notes = run_dir / "log" / "faults.jsonl"
        self._faults = {
            index: fault
            for index, fault in enumerate(faults)
            if fault.role == role and fault.stage in (None, stage) and fault.replica in (None, replica)
        }

    @property
    def armed(self) -> bool:
        return bool(self._faults)

    def spring(self, phase: str, step: int) -> None:
        for index, fault in self._faults.items():
            here = fault.phase in (None, phase) and step >= (fault.step or 0)
            if here and (not fault.times or self._count(index, phase, step, fault.times)):
                _happen(fault)

    def _count(self, index: int, phase: str, step: int, times: int) -> bool:
        """Note it, unless it has happened so often."""
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        with self._notes.open("a+", encoding="utf-8") as file:
            file.seek(0)
            if sum(json.loads(line)["fault"] == index for line in file) >= times:
                return False
            row = {"fault": index, "phase": phase, "step": step, "pid": os.getpid(), "time": time.time()}
            file.write(json.dumps(row) + "\n")
        return True


def _happen(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "crash":
            ctypes.string_at(0)
        case "raise":
            raise InjectedFault("a fault on purpose")
        case "memory":
            raise MemoryError("a fault on purpose")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "hang" | "delay":
            time.sleep(fault.seconds)
        case "hold":
            # PyDLL keeps the interpreter lock, as a loop in careless native code does.
            ctypes.PyDLL(None).sleep(int(fault.seconds))
