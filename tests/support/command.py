"""Running the command as a user does: in a process of its own, with a deadline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def scpl_dist(
    *arguments: str | Path, code: int = 0, timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """Run ``scpl-dist`` to its end and check its exit code.

    Raises:
        AssertionError: another exit code; the message has all output.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scpl_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == code, (
        f"exit code {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
    )
    return done
