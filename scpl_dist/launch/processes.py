"""The child processes of the launcher, as the kernel knows them.

The elastic agent does not tell the process ids of its workers, and a group that hangs has to be looked into and
ended from outside. Linux only; elsewhere nothing is found, and the agent's own time-outs have to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_STATES = {
    "T": "stopped (by SIGSTOP or a debugger)",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or device",
}


def children() -> list[int]:
    """Process ids of the living children of this process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        status = _status(int(entry.name))
        if status is not None and status[0] != "Z" and status[1] == os.getpid():
            found.append(int(entry.name))
    return found


def state(pid: int) -> str | None:
    """What is special about the state of a process, in words; None if nothing is, or it is gone."""
    status = _status(pid)
    return _STATES.get(status[0]) if status is not None else None


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes that may be gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _status(pid: int) -> tuple[str, int] | None:
    """State letter and parent of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    letter, parent, *_ = text.rpartition(")")[2].split()
    return letter, int(parent)


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it is gone."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {key: value for key, _, value in (entry.partition("=") for entry in content.split("\0"))}


def exit_code(pid: int) -> int | None:
    """Wait for a child's end without taking its exit status away from whoever started it.

    Returns:
        Its exit code, negative for a signal; None if the other one was faster.
    """
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return None
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
