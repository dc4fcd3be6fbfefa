"""Conducting a run that fails: start it with faults, wait for its end, look at what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from scpl_dist.run.faults import Fault, encode, fired
from tests.support.command import scpl_dist
from tests.support.programs import until_nothing

SMALL = [
    "run.epochs=4",
    "data.batch_size=256",
    "data.augmentation=none",
    "metrics.port=0",
    "runtime.timeout_s=60",
]
"""5 steps an epoch, 20 in all."""
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
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == event]

    def losses(self) -> dict[tuple[int, int], dict[str, float]]:
        """By step and block; every step must be there once."""
        rows = self.rows("train")
        found = {(row["step"], row["block"]): row["terms"] for row in rows}
        assert len(found) == len(rows), "a step is there twice"
        return found

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        target = folder / f"{self.run.name}.safetensors"
        scpl_dist("export", self.run, target)
        return load_file(target)


class Running:
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
        command = [sys.executable, *command, "--run-dir", str(run), *options]
        command += [part for text in (*SMALL, *settings) for part in ("-o", text)]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (encode(*faults) if faults else {}) | dict(environment or {}),
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything that still runs for this run folder, the launcher too."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            if str(self.run) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def role(self, name: str) -> psutil.Process:
        """The process of the "launcher", of the "coordinator" or of a stage, such as "0"."""
        process = self._find(name)
        assert process is not None, f"no process {name}: {self.process.poll()}"
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
                found = "launcher" if process.pid == self.process.pid else role_of(process)
            except psutil.NoSuchProcess:
                continue
            if found == name:
                return process
        return None

    def wait_for(self, event: str, count: int = 1, limit_s: float = 120) -> None:
        """Until metrics.jsonl has so many rows of this event."""
        deadline = time.monotonic() + limit_s
        path = self.run / "metrics.jsonl"
        while not path.exists() or path.read_text().count(f'"event": "{event}"') < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, limit_s: float = 300) -> Ended:
        """Wait for the end; nothing may be left over."""
        screen, _ = self.process.communicate(timeout=limit_s)
        seconds = time.monotonic() - self.started
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left over: {[process.cmdline() for process in left]}\n{screen}"
        return Ended(self.run, self.process.returncode, screen, seconds)


def role_of(process: psutil.Process) -> str | None:
    """What a process is for."""
    command: list[str] = process.cmdline()
    if command[:1] == ["scpl-dist:"]:
        return command[2] if command[1] == "stage" else command[1]
    if "scpl_dist.coordinator.service" in command:
        return "coordinator"
    if "scpl_dist worker" in " ".join(command):
        rank: str | None = process.environ().get("RANK")
        return rank
    return None


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


def same(ended: Ended, undisturbed: Ended, folder: Path) -> None:
    """Losses of all steps and blocks, accuracies and weights, with ``==``."""
    assert ended.code == 0, ended.screen
    assert ended.losses() == undisturbed.losses()
    accuracies = [
        [(row["epoch"], row["split"], row["accuracy"]) for row in run.rows("eval")]
        for run in (ended, undisturbed)
    ]
    assert accuracies[0] == accuracies[1]
    weights, expected = ended.weights(folder), undisturbed.weights(folder.parent)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
