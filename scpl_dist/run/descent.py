"""No process of a run outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
