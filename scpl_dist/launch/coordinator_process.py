"""The coordinator as a child of the process that starts a run: the local launcher, or rank 0 under torchrun.

parent  -- standard input: signals, workers that exited -->  coordinator   end of file: the parent died
<-------- run.json in the run folder --------------               "sockets are bound"
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from scpl_dist.launch.child import Order
from scpl_dist.storage.run_folder import RunFolder

_START_S = 60.0


class CoordinatorProcess:
    """A coordinator to be started, and the way to tell it something.

    Args:
        folder: the run's folder; its ``config.toml`` is the configuration.
        resume: "never", "auto" or the folder of a checkpoint.
        restarted: what ended each earlier start of this run.
        may_restart: whether a failure may be followed by another start.

    Attributes:
        generation: unique name of this start.
        order: for whoever starts it, with `stdin` as standard input; close `stdin` then.
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
        self._ours, self.stdin = socket.socketpair()
        self.order = Order(
            entry="scpl_dist.coordinator.service:serve",
            arguments={
                "run_dir": str(folder.path),
                "generation": self.generation,
                "resume": resume,
                "restarted": list(restarted),
                "launched": True,
                "may_restart": may_restart,
            },
            title=f"scpl-dist: coordinator {folder.path}",
            orphan=True,  # it says how the run ended, also when its parent was killed
        )

    def endpoint(self, alive: Callable[[], bool]) -> str | None:
        """Address of the control plane; None if the coordinator ended instead of binding it."""
        deadline = time.monotonic() + _START_S
        while alive() and time.monotonic() < deadline:
            run = self._folder.read("run.json")
            if run is not None and run.get("generation") == self.generation:
                return str(run["control"])
            time.sleep(0.02)
        return None

    def tell(self, event: dict[str, Any]) -> None:
        """Send one event; returns at once."""
        try:
            self._ours.sendall(json.dumps(event).encode() + b"\n")
        except OSError:
            pass  # it has ended, which is an event of its own

    def close(self) -> None:
        """Say nothing more."""
        self._ours.close()
