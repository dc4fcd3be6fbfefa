"""The processes of a run: each is told by an `Order` what it shall be.

    launcher, which has imported torch  -- fork ---------------->  obey(order)
    whoever cannot fork safely          -- a program of its own -> obey(order)

Nothing else knows the difference, but that a fork takes milliseconds and a program seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import setproctitle

from scpl_dist.run.descent import die_with_parent
from scpl_dist.run.errors import PreflightError

# Seconds that a killed process may take to end.
_KILLED_S = 10.0


@dataclass(frozen=True)
class Order:
    """What a process shall do."""

    entry: str
    """``module:function``; its result is the exit code."""
    arguments: dict[str, Any]
    """Of the function, plain values."""
    title: str
    """Name of the process, as ``ps`` shows it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those of the parent."""
    log: str | None = None
    """File for all its output; None is the output of the parent."""
    orphan: bool = False
    """Whether it outlives its parent; otherwise the kernel kills it then (Linux only)."""


def start(order: Order, stdin: int | None = None) -> psutil.Process:
    """Start a process; `stdin` is a descriptor that becomes its standard input."""
    if not safe_to_fork():
        return spawn(order, stdin)
    sys.stdout.flush()  # or the child would write it, too
    pid = os.fork()
    if pid:
        return psutil.Process(pid)
    try:
        os.setsid()  # Ctrl-C reaches the launcher only, which passes it on
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
        # Nothing of the parent's stays open, so that its death is seen by whoever listens to it.
        os.closerange(3, 1 << 12)
        obey(order)
    finally:
        os._exit(1)  # whatever happens, the child does not go on as its parent


def safe_to_fork() -> bool:
    """Whether a fork of this process is sound: on Linux, and without threads, which may hold locks."""
    return bool(sys.platform.startswith("linux") and psutil.Process().num_threads() == 1)


def spawn(order: Order, stdin: int | None = None) -> psutil.Process:
    """Start the process as a program of its own, which imports what can be imported here."""
    command = [sys.executable, "-m", "scpl_dist.launch.process", json.dumps(asdict(order))]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return psutil.Popen(
        command,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )


def obey(order: Order) -> NoReturn:
    """Be the process of this order."""
    code = 1
    try:
        if not order.orphan:
            die_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):  # whatever the parent does with them
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(order.environment)
        setproctitle.setproctitle(order.title)
        if order.log is not None:
            redirect_output(Path(order.log))
        code = _function(order.entry)(**order.arguments)
    except BaseException:
        traceback.print_exc()
    leave(code)


def _function(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def leave(code: int) -> NoReturn:
    """End at once: no thread or library of a finished run may keep the process, and children die with it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def redirect_output(path: Path) -> None:
    """Send what this process and its libraries print to a file, also what C++ prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def ended(process: psutil.Process) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs."""
    try:
        return int(process.wait(0))
    except psutil.TimeoutExpired:
        return None


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill children, and wait until they are gone; they may be already."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, _KILLED_S)


def call(
    entry: str,
    arguments: dict[str, Any],
    title: str,
    start: Callable[[Order, int], psutil.Process] = start,
    meanwhile: Callable[[psutil.Process], AbstractContextManager[None]] = nullcontext,
    heard: Callable[[Any], None] = lambda told: None,
) -> Any:
    """The result of a function, called in a process of its own; None if that was killed. Both as JSON has them.

    `meanwhile` is entered with the process while it runs; `heard` is called with what it `tell`s before the result.

    Raises:
        ValueError: the function has found a mistake of the user's.
        PreflightError: it has raised something else.
    """
    found: dict[str, Any] = {}
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("rb") as answer:
        with theirs:
            order = Order("scpl_dist.launch.process:_answer", {"entry": entry, "arguments": arguments}, title)
            process = start(order, theirs.fileno())
        try:
            with meanwhile(process):
                for line in answer:
                    found = json.loads(line)
                    if "told" in found:
                        heard(found["told"])
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
    if "mistake" in found:
        raise ValueError(found["mistake"])
    if "raised" in found:
        raise PreflightError(found["raised"])
    return found.get("result")


def tell(value: Any) -> None:
    """Let the process that has called this one with `call` hear a plain value before the result."""
    os.write(0, json.dumps({"told": value}).encode() + b"\n")


def _answer(entry: str, arguments: dict[str, Any]) -> int:
    """The other end of `call`, at standard input."""
    try:
        found = {"result": _function(entry)(**arguments)}
    except ValueError as error:
        found = {"mistake": str(error)}
    except PreflightError as error:  # of a call from here, where it was printed
        found = {"raised": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"raised": f"{type(error).__name__}: {error}"}
    os.write(0, json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    obey(Order(**json.loads(sys.argv[1])))
