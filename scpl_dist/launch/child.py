"""A process of a run, right after it came into being: as a fork of the server, or as a program of its own.

An `Order` says what it shall be. Both ways carry out the same order by `obey`, so nothing else knows the difference.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import setproctitle


@dataclass(frozen=True)
class Order:
    """What a process shall do.

    Attributes:
        entry: ``module:function``; its result is the exit code.
        arguments: of the function, plain values.
        title: name of the process, as ``ps`` shows it.
        environment: variables beside those of the parent.
        log: file for all its output; None is the output of the parent.
        orphan: whether it outlives its parent; otherwise the kernel kills it then (Linux only).
    """

    entry: str
    arguments: dict[str, Any]
    title: str
    environment: dict[str, str] = field(default_factory=dict)
    log: str | None = None
    orphan: bool = False


def obey(order: Order) -> NoReturn:
    """Be the process of this order."""
    if not order.orphan:
        die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # whatever the parent does with them
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(order.environment)
    setproctitle.setproctitle(order.title)
    if order.log is not None:
        redirect_output(Path(order.log))
    code = 1
    try:
        module, _, name = order.entry.partition(":")
        code = getattr(importlib.import_module(module), name)(**order.arguments)
    except BaseException:
        traceback.print_exc()
    leave(code)


def spawn(order: Order, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start the process as a program of its own: slower than a fork, possible everywhere."""
    command = [sys.executable, "-m", "scpl_dist.launch.child", json.dumps(asdict(order))]
    return subprocess.Popen(command, stdin=stdin, start_new_session=True)


def leave(code: int) -> NoReturn:
    """End at once: no thread or library of a finished run may keep the process, and children die with it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def redirect_output(path: Path) -> None:
    """Send what this process and its libraries print to a file, also what C++ prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    obey(Order(**json.loads(sys.argv[1])))
