"""The processes of a local run, as the launcher sees them: started by the server, known by their process ids."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from scpl_dist.launch.child import Order

# Seconds that the server may take to import torch, on a slow disk, and to start a process.
_START_S = 120.0
# Seconds that the coordinator may take to end by itself after the server was killed.
_ALONE_S = 5.0


class Children:
    """Starts processes and tells when they end.

    Args:
        title: name of the server's process.
        environment: variables of all of them beside those of this process.
        ended: called in a thread with the process id and the exit code of each that ends, negative for a signal.
        command: what to start the server with, before its arguments.

    Attributes:
        alive: whether processes can still be started.
        pid: of the server.
    """

    def __init__(
        self,
        title: str,
        environment: Mapping[str, str],
        ended: Callable[[int, int], None],
        command: Sequence[str] = (sys.executable, "-m", "scpl_dist.launch.server"),
    ) -> None:
        self.alive = True
        self._ended = ended
        self._numbers = itertools.count()
        self._started: dict[int, queue.SimpleQueue[int]] = {}
        self._living: set[int] = set()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            # The server has this process's search path: what the user can import here is found there, too.
            self._server = subprocess.Popen(
                [*command, str(theirs.fileno()), title, os.getcwd(), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(environment),
                start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on
            )
        self.pid = self._server.pid
        self._thread = threading.Thread(target=self._listen, name="children", daemon=True)
        self._thread.start()

    def start(self, order: Order, stdin: socket.socket | None = None) -> int:
        """Start a process; returns its process id.

        Raises:
            RuntimeError: the server has ended, or does not answer.
        """
        number = next(self._numbers)
        answer = self._started[number] = queue.SimpleQueue()
        request = {"number": number, "order": asdict(order), "stdin": stdin is not None}
        line = json.dumps(request).encode() + b"\n"
        try:
            socket.send_fds(self._socket, [line], [stdin.fileno()] if stdin is not None else [])
            pid = answer.get(timeout=_START_S)
        except (OSError, queue.Empty):
            pid = -1
        if pid < 0:
            raise RuntimeError(f"the server that starts the processes of the run (pid {self.pid}) is gone")
        return pid

    def call(self, order: Order) -> Any:
        """Start a process that gives an answer, wait for it, and return the answer.

        Its standard input is a socket, into which it writes JSON.

        Returns:
            What it wrote; None if it ended without an answer.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.start(order, theirs)
            theirs.close()
            with ours.makefile("rb") as answer:
                text = answer.read()
        return json.loads(text) if text else None

    def send(self, pids: Sequence[int], number: int) -> None:
        """Send a signal to those that have not ended."""
        with self._lock:  # whose end is not told yet has its process id still
            for pid in self._living.intersection(pids):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass

    def close(self) -> None:
        """End the server, and with it everything that it has started."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._server.wait(_ALONE_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self._hear(json.loads(line))
        except OSError:
            pass  # closed from this side
        self.alive = False
        for answer in list(self._started.values()):
            answer.put(-1)
        self._conclude()

    def _hear(self, line: dict[str, int]) -> None:
        if "number" in line:
            with self._lock:
                self._living.add(line["pid"])
            self._started.pop(line["number"]).put(line["pid"])
            return
        with self._lock:
            self._living.discard(line["pid"])
        self._ended(line["pid"], line["code"])

    def _conclude(self) -> None:
        """The server is gone: most children died with it, and whoever has not gets a moment."""
        deadline = time.monotonic() + _ALONE_S
        for pid in list(self._living):
            while lives(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.send([pid], signal.SIGKILL)
            with self._lock:
                self._living.discard(pid)
            self._ended(pid, -signal.SIGKILL)


def lives(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return False
    return bool(status != psutil.STATUS_ZOMBIE)
