"""Conducting a run that fails: start it with faults, wait for its end, look at what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from scpl_dist.run.faults import Fault
from tests.support.command import called
from tests.support.faults import encode, fired
from tests.support.programs import Program, until_nothing
from tests.support.run_folder import Losses, accuracies, losses, rows

SMALL = [
    "run.epochs=4",
    "data.batch_size=256",
    "data.augmentation=none",
    "metrics.port=0",
    "runtime.timeout_s=60",
    "runtime.max_restarts=0",
]
"""5 steps an epoch, 20 in all."""
IMPATIENT_S = 12
IMPATIENT = f"runtime.timeout_s={IMPATIENT_S}"
"""For runs that a time-out ends: no longer than it takes all workers to arrive on a busy machine."""
TRAIN = ("-m", "scpl_dist", "train")


@dataclass
class Ended:
    """A run that is over."""

    run: Path
    code: int
    screen: str
    seconds: float

    @property
    def exit_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "exit.json").read_text())
        return found

    @property
    def last_line(self) -> str:
        return self.screen.rstrip().splitlines()[-1]

    def rows(self, event: str) -> list[dict[str, Any]]:
        return rows(self.run, event)

    def losses(self) -> Losses:
        return losses(self.run)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """As exported."""
        target = self.run.with_suffix(".safetensors")
        called("export", self.run, target)
        return load_file(target)


class Running(Program):
    """A run in progress; use it as a context, which leaves no process behind."""

    def __init__(
        self,
        run: Path,
        *settings: str,
        faults: tuple[Fault, ...] = (),
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = TRAIN,
    ) -> None:
        self.run = run
        overrides = [part for text in (*SMALL, *settings) for part in ("-o", text)]
        self.started = time.monotonic()
        super().__init__(
            sys.executable,
            *command,
            "--run-dir",
            run,
            *options,
            *overrides,
            env=encode(*faults) | dict(environment or {}),
        )

    def __enter__(self) -> Running:
        return self

    def close(self) -> None:
        """Kill what is left of the run, whoever has become its parent."""
        super().close()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything that still runs for this run folder, the launcher too."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = words(process.info["cmdline"] or [])
            if str(self.run) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def role(self, name: str) -> psutil.Process:
        """The process of the "launcher", of the "coordinator" or of a stage, such as "0", once it is there."""

        def missing() -> str:
            assert not self.ended, self.output
            return "" if self._find(name) else f"process {name}"

        until_nothing(missing)
        process = self._find(name)
        assert process is not None, f"process {name} has ended"
        return process

    def importing(self, name: str, library: str) -> psutil.Process:
        """The same at the moment when it imports a library, which is long before it can do anything."""

        def missing() -> str:
            process = self._find(name)
            if process is None:
                return f"process {name}"
            loaded = Path(f"/proc/{process.pid}/maps").read_text().count(library)
            return "" if loaded else f"{library} in process {name}"

        until_nothing(missing)
        return self.role(name)

    def _find(self, name: str) -> psutil.Process | None:
        for process in self.processes():
            try:
                found = "launcher" if process.pid == self.pid else role_of(process)
            except psutil.NoSuchProcess:
                continue
            if found == name:
                return process
        return None

    def pids(self, *names: str) -> dict[str, set[int]]:
        """Numbers of all processes that have these roles from now to the end of the run."""
        found: dict[str, set[int]] = {name: set() for name in names}
        while not self.ended:
            for name in names:
                process = self._find(name)
                if process is not None:
                    found[name].add(process.pid)
        return found

    def wait_for_rows(self, event: str, count: int = 1, limit_s: float = 120) -> None:
        """Until metrics.jsonl has so many rows of this event."""

        def missing() -> str:
            ended = self.ended
            found = len(rows(self.run, event))
            if found >= count:
                return ""
            assert not ended, self.output
            return f"{found} rows of {event!r} instead of {count}:\n{self.output}"

        until_nothing(missing, limit_s)

    def end(self, limit_s: float = 300) -> Ended:
        """Wait for the end; nothing may be left over."""
        code = self.wait(limit_s)
        seconds = time.monotonic() - self.started
        until_nothing(self.processes, 30)
        return Ended(self.run, code, self.output, seconds)


def role_of(process: psutil.Process) -> str | None:
    """What a process is for: "coordinator", or the stage of a worker, such as "1" or "1.0".

    It says so in its title, ``scpl-dist: stage 1 RUN_DIR``, or, where it was started as a program, by its command
    line and its rank.
    """
    command = words(process.cmdline())
    if command[:1] == ["scpl-dist:"]:
        return command[2] if command[1] == "stage" else command[1]
    if "scpl_dist.coordinator.service" in command:
        return "coordinator"
    if "scpl_dist worker" in " ".join(command):
        rank: str | None = process.environ().get("RANK")
        return rank
    return None


def words(command: list[str]) -> list[str]:
    """Of a command line, or of a title, which may be one string with much nothing behind it."""
    return " ".join(command).split()


def halted(running: Running, stage: str, faults: int) -> psutil.Process:
    """The process of a stage that a fault has stopped; so many faults have happened by then."""

    def missing() -> str:
        assert running.process.poll() is None, running.process.communicate()[0]
        if len(fired(running.run)) < faults:
            return f"fault {faults}"
        return "" if running.role(stage).status() == psutil.STATUS_STOPPED else f"stage {stage} still runs"

    until_nothing(missing)
    return running.role(stage)


def conduct(
    run: Path, *settings: str, faults: tuple[Fault, ...] = (), options: tuple[str, ...] = ()
) -> Ended:
    """A run from its start to its end."""
    with Running(run, *settings, faults=faults, options=options) as running:
        return running.end()


def same(ended: Ended, undisturbed: Ended) -> None:
    """Losses of all steps and blocks, accuracies and weights, with ``==``."""
    assert ended.code == 0, ended.screen
    assert ended.losses() == undisturbed.losses()
    assert accuracies(ended.run) == accuracies(undisturbed.run)
    assert ended.weights.keys() == undisturbed.weights.keys()
    for name, tensor in undisturbed.weights.items():
        assert torch.equal(ended.weights[name], tensor), name
