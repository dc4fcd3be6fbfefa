"""The server that the processes of a local run are forked from: torch is imported once, here, and not in each of them.

    launcher                             server                              children
    start {number, order} + stdin ---->  imports torch, forks ------------>  obey(order)
    <------------- {number, pid} ------
    <------------- {pid, code} --------  waits for its children  <---------  exit

Lines of JSON over a socket; a descriptor that comes with an order becomes the child's standard input. The server
dies with the launcher, and its children with it. Where a fork is not safe it starts programs instead.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections import deque
from typing import Any

from scpl_dist.launch.child import Order, die_with_parent, obey, spawn

FIRST = (
    "torch",
    "torch.distributed.rpc",
    "scpl_dist.launch.preflight",
    "scpl_dist.data",
    "scpl_dist.plan.plan",
)
THEN = ("scpl_dist.coordinator.service", "scpl_dist.launch.rank", "torch._dynamo")
"""Imported before the first order and after it: the first is the preflight, which then has a core of its own.
Every optimizer imports torch._dynamo at its first step; once here is quicker than once in each worker."""


class Server:
    """Forks on request until the launcher is gone."""

    def __init__(self, launcher: socket.socket) -> None:
        self._launcher = launcher
        self._rest = b""
        self._descriptors: deque[int] = deque()
        self._pids: set[int] = set()

    def run(self) -> None:
        """Serve; returns when the launcher has closed its end."""
        wakeup, signalled = socket.socketpair()
        wakeup.setblocking(False)
        signalled.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(signalled.fileno())
        selector = selectors.DefaultSelector()
        selector.register(self._launcher, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        todo = deque(THEN if sys.platform.startswith("linux") else ())
        served = False
        while True:
            for key, _ in selector.select(0 if served and todo else None):
                if key.fileobj is wakeup:
                    wakeup.recv(1 << 12)
                    self._reap()
                elif not self._serve():
                    return
                else:
                    served = True
            if served and todo:
                importlib.import_module(todo.popleft())

    def _serve(self) -> bool:
        """Take what the launcher says; False if it is gone."""
        chunk, descriptors, _, _ = socket.recv_fds(self._launcher, 1 << 16, 8)
        self._descriptors += descriptors
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._start(json.loads(line))
        return bool(chunk)

    def _start(self, request: dict[str, Any]) -> None:
        order = Order(**request["order"])
        stdin = self._descriptors.popleft() if request["stdin"] else None
        if safe_to_fork():
            pid = self._fork(order, stdin)
        else:
            process = spawn(order) if stdin is None else spawn(order, stdin)
            process.returncode = 0  # reaped here, with all others
            pid = process.pid
        self._pids.add(pid)
        if stdin is not None:
            os.close(stdin)
        self._say({"number": request["number"], "pid": pid})

    def _fork(self, order: Order, stdin: int | None) -> int:
        gc.freeze()  # what is imported stays shared between the processes
        pid = os.fork()
        if pid:
            return pid
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
        # Nothing of the launcher's stays open, so that its death is seen by whoever listens to it.
        os.closerange(3, 1 << 12)
        obey(order)

    def _reap(self) -> None:
        for pid in list(self._pids):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._pids.remove(pid)
                self._say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})

    def _say(self, line: dict[str, int]) -> None:
        try:
            self._launcher.sendall(json.dumps(line).encode() + b"\n")
        except OSError:
            pass  # it is gone, which the next look at the socket tells


def safe_to_fork() -> bool:
    """Whether a fork of this process is sound: on Linux, without threads that may hold locks, without CUDA."""
    if not sys.platform.startswith("linux") or len(os.listdir("/proc/self/task")) > 1:
        return False
    torch = sys.modules.get("torch")
    return threading.active_count() == 1 and not (torch is not None and torch.cuda.is_initialized())


def main() -> None:
    """Entry: ``python -m scpl_dist.launch.server DESCRIPTOR TITLE PATH...``."""
    import setproctitle

    die_with_parent()
    descriptor, title, *path = sys.argv[1:]
    setproctitle.setproctitle(title)
    sys.path += [entry for entry in path if entry not in sys.path]
    # numpy's linear algebra would start threads when it is imported, and a fork would not be safe.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    gc.disable()
    if sys.platform.startswith("linux"):
        for name in FIRST:
            importlib.import_module(name)
    gc.enable()
    Server(socket.socket(fileno=int(descriptor))).run()


if __name__ == "__main__":
    main()
