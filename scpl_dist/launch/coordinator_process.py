"""The coordinator as a child of the process that starts a run: the local launcher, or rank 0 under torchrun.

    parent  -- standard input: signals, workers that exited -->  coordinator   end of file: the parent died
            <-------- run.json in the run folder --------------               "sockets are bound"

The child runs in a session of its own: a Ctrl-C reaches the parent only, which passes it on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from scpl_dist.storage.run_folder import RunFolder

_START_S = 60.0


class CoordinatorProcess:
    """A started coordinator.

    Args:
        folder: the run's folder; its ``config.toml`` is the configuration.
        resume: "never", "auto" or the folder of a checkpoint.
        restarted: what ended each earlier start of this run.
        may_restart: whether a failure may be followed by another start.

    Attributes:
        generation: unique name of this start.
    """

    def __init__(
        self,
        folder: RunFolder,
        resume: str = "never",
        restarted: Sequence[str] = (),
        may_restart: bool = False,
    ) -> None:
        self.generation = uuid.uuid4().hex
        self._folder = folder
        folder.remove("run.json", "exit.json", "result.json")
        command = [sys.executable, "-m", "scpl_dist.coordinator.service", str(folder.path / "config.toml")]
        command += ["--run-dir", str(folder.path), "--generation", self.generation, "--resume", resume]
        command += ["--launcher"]
        command += ["--may-restart"] if may_restart else []
        for reason in restarted:
            command += ["--restarted", reason]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def endpoint(self) -> str | None:
        """Address of the control plane; None if the coordinator ended instead of binding it."""
        deadline = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            run = self._folder.read("run.json")
            if run is not None and run.get("generation") == self.generation:
                return str(run["control"])
            time.sleep(0.02)
        return None

    def tell(self, event: dict[str, Any]) -> None:
        """Send one event; returns at once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(event).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which is an event of its own

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Exit code, negative for a signal; None if the process still runs after the time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
