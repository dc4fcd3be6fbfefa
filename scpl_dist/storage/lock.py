"""One run at a time in a folder.

    .lock    locked by the process that starts a run; the lock goes with that process, however it ends
    .lease   names the host of that process; the coordinator touches it for as long as it runs

Among the processes of a host the lock decides. Some shared file systems, such as NFS without its lock service, keep
locks to the host: there a start on another one sees the lease being touched, and is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TOUCHED_EVERY_S = 5.0
EXPIRED_AFTER_S = 30.0  # without a touch, as the clock of the host that waits has it
FILES = {".lock", ".lease"}


@contextlib.contextmanager
def locked(folder: Path, expired_after_s: float = EXPIRED_AFTER_S) -> Iterator[None]:
    """Keep other starts out of a folder; ValueError if a run is in progress there."""
    fix = "wait for its end, or stop it first"
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--run-dir {folder}: a run is in progress in this folder: {fix}") from None
        lease = folder / ".lease"
        holder = _holder(lease)
        if holder and _is_touched(lease, holder, expired_after_s):
            raise ValueError(f"--run-dir {folder}: a run is in progress in this folder on {holder}: {fix}")
        try:
            lease.unlink(missing_ok=True)
            with lease.open("x") as mine:  # only one of two hosts that come at once can make it
                mine.write(socket.gethostname())
        except FileExistsError:
            raise ValueError(
                f"--run-dir {folder}: another host has just started a run there: {fix}"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # of a disk that cannot be written any more; it expires
                lease.unlink(missing_ok=True)


def is_locked(folder: Path) -> bool:
    """Whether a process of this host has a run in a folder."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def touch(folder: Path) -> None:
    """Show that the run in a folder is alive."""
    with contextlib.suppress(OSError):  # a folder that cannot be written ends a run elsewhere
        os.utime(folder / ".lease")


def _holder(lease: Path) -> str:
    """The other host that has the lease, alive or not; empty if there is none."""
    try:
        name = lease.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    return "" if name == socket.gethostname() else name


def _is_touched(lease: Path, holder: str, expired_after_s: float) -> bool:
    """Whether the lease changes before it expires."""
    print(
        f"the folder {lease.parent} belongs to a run on {holder}: waiting up to {expired_after_s:.0f} s for a sign of "
        "life from it",
        file=sys.stderr,
        flush=True,
    )
    first = _stamp(lease)
    deadline = time.monotonic() + expired_after_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, expired_after_s / 10))
        now = _stamp(lease)
        if now != first:
            return now is not None  # gone is given back
    return False


def _stamp(lease: Path) -> int | None:
    try:
        with (
            lease.open() as file
        ):  # NFS asks its server when a file is opened, and may not when it is only looked at
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
