"""The coordinator as a child of the process that starts a run: the local launcher, or rank 0 under torchrun.

parent  -- standard input: signals, workers that exited -->  coordinator   end of file: the parent died
<-------- the same socket: workers to be replaced, and again and again that there are some --
<-------- run.json in the run folder --------------               "sockets are bound"
"""

from __future__ import annotations

import json
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

from scpl_dist.launch.process import Order, ended
from scpl_dist.run.failures import Cause
from scpl_dist.storage.run_folder import RunFolder

_LOOK_S = 0.05


class CoordinatorProcess:
    """A coordinator that `start` starts, and the way to tell it something.

    `restore`, `restarted` and what follows are those of `scpl_dist.coordinator.service.serve`. From here on the folder
    is changed.
    """

    def __init__(
        self,
        folder: RunFolder,
        start: Callable[[Order, int], psutil.Process],
        restore: str,
        restarted: Sequence[str] = (),
        may_restart: bool = False,
        replaceable: bool = True,
        led: bool = False,
    ) -> None:
        self._folder = folder
        folder.clear()
        self._generation = uuid.uuid4().hex
        self._rest = b""
        order = Order(
            entry="scpl_dist.coordinator.service:serve",
            arguments={
                "run_dir": str(folder.path),
                "generation": self._generation,
                "restore": restore,
                "restarted": list(restarted),
                "launched": True,
                "may_restart": may_restart,
                "replaceable": replaceable,
                "led": led,
            },
            title=f"scpl-dist: coordinator {folder.path}",
            orphan=True,  # it says how the run ended, also when its parent was killed
        )
        self._socket, stdin = socket.socketpair()
        with stdin:
            self.process = start(order, stdin.fileno())

    def endpoint(self, alive: Callable[[], bool]) -> str | None:
        """Address of the control plane; None if the coordinator ended instead of binding it."""
        deadline = time.monotonic() + 60
        while alive() and time.monotonic() < deadline:
            run = self._folder.read("run.json")
            if run is not None and run.get("generation") == self._generation:
                return str(run["control"])
            time.sleep(0.01)
        return None

    def tell(self, event: dict[str, Any]) -> None:
        """Send one event; returns at once."""
        with suppress(OSError):  # it has ended, which is an event of its own
            self._socket.sendall(json.dumps(event).encode() + b"\n")

    def heard(self) -> list[dict[str, Any]]:
        """What the coordinator has said since the last call: "replace" a worker, or that some are "working"."""
        try:
            self._rest += self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except OSError:  # nothing, or it has ended
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def wait(self, patience_s: float) -> int | None:
        """Its exit code, however long that takes; None once no worker has been left for so many seconds."""
        silent = 0.0  # not by the clock: this process may have been stopped, and the coordinator with it
        while (code := ended(self.process)) is None and silent < patience_s:
            time.sleep(_LOOK_S)
            silent = 0.0 if self.heard() else silent + _LOOK_S
        return code

    def close(self) -> None:
        self._socket.close()


def conclude(folder: RunFolder, code: int, reason: str, cause: Cause | None = None) -> None:
    """Write the ``exit.json`` that a coordinator could not write; a full disk must not hide what is said of it."""
    try:
        folder.fail(code, reason, cause)
    except OSError as error:
        print(f"warning: exit.json could not be written: {error}", file=sys.stderr, flush=True)
