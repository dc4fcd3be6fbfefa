"""Failures on purpose, so that every promise about failures can be tested on real processes.

A fault says what happens to whom, and where: ``{"action": "kill", "stage": 1, "step": 7, "phase": "send"}``. Faults
come from the environment variable `VARIABLE` as a JSON list, which is read here and nowhere else; without it nothing
of this module is active. A fault fires once per run, also over restarts: it is noted in ``RUN/log/faults.jsonl``
before it happens. With ``"times": 0`` it fires whenever its place is reached.

    worker       "loading" before its data set, every change of phase (`PhaseTimer.enter`), and "write" and "written"
                 around each part in the thread that writes a checkpoint
    coordinator  every event ("gathering", "preparing", "running"), and "commit" around publishing a checkpoint
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

VARIABLE = "SCPL_DIST_FAULTS"


class InjectedFault(RuntimeError):
    """Raised by a fault with the action "raise"."""


class Fault(BaseModel):
    """One failure.

    A fault with a ``step`` happens at the first matching place at or after that step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal[
        "kill", "crash", "raise", "memory", "full", "stop", "hang", "hold", "delay", "terminate", "corrupt"
    ]
    """SIGKILL, a segmentation fault, an exception, out of memory, disk full, SIGSTOP, endless sleep, endless sleep
    that holds the interpreter lock, a pause of ``seconds``, SIGTERM, or a flipped byte in the file at hand."""
    role: Literal["worker", "coordinator"] = "worker"
    stage: int | None = None
    step: int | None = None
    phase: str | None = None
    seconds: Annotated[float, Field(ge=0)] = 3600.0
    times: Annotated[int, Field(ge=0)] = 1


_LIST = TypeAdapter(list[Fault])


def encode(*faults: Fault) -> dict[str, str]:
    """The environment that makes these faults happen."""
    return {VARIABLE: _LIST.dump_json(list(faults)).decode()}


def fired(run_dir: Path) -> list[dict[str, Any]]:
    """What has happened in a run so far: index of the fault and wall time."""
    path = run_dir / "log" / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Trap:
    """The faults of one process.

    Args:
        faults: all faults of the run.
        role: this process.
        stage: its stage, None for the coordinator.
        run_dir: run folder.
    """

    def __init__(self, faults: list[Fault], role: str, stage: int | None, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._faults = [
            (index, fault)
            for index, fault in enumerate(faults)
            if fault.role == role and (fault.stage is None or fault.stage == stage)
        ]

    @classmethod
    def from_environment(cls, role: str, stage: int | None, run_dir: Path) -> Trap | None:
        """The trap of this process; None without faults.

        Raises:
            ValueError: the variable holds no list of faults.
        """
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        try:
            return cls(_LIST.validate_json(text), role, stage, run_dir)
        except ValidationError as error:
            raise ValueError(f"{VARIABLE}: not a list of faults: {error}") from None

    def spring(self, phase: str, step: int, path: Path | None = None) -> None:
        """Let happen what shall happen here.

        Args:
            phase: what the process does now.
            step: where it is.
            path: file at hand, for the action "corrupt".
        """
        for index, fault in self._faults:
            if fault.phase not in (None, phase) or (fault.step is not None and step < fault.step):
                continue
            if fault.action == "corrupt" and path is None:
                continue
            if fault.times:
                if sum(row["fault"] == index for row in fired(self._run_dir)) >= fault.times:
                    continue
                self._note(index, phase, step)
            _happen(fault, path)

    def _note(self, index: int, phase: str, step: int) -> None:
        row = {"fault": index, "phase": phase, "step": step, "pid": os.getpid(), "time": time.time()}
        path = self._run_dir / "log" / "faults.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _happen(fault: Fault, path: Path | None) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "crash":
            ctypes.string_at(0)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
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
        case "corrupt":
            assert path is not None
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 0xFF]))
