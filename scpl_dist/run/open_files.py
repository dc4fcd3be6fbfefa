"""How many files and connections a process may have open."""

from __future__ import annotations

import contextlib
import resource


def raise_limit() -> None:
    """To what the system allows this process: a port that strangers knock at must not take what the run needs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where "unlimited" is not allowed after all
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
