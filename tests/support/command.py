"""Running the command as a user does: in a process of its own, with a deadline, or at least by its entry point."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from scpl_dist import cli
from scpl_dist.run.faults import Fault
from tests.support.faults import encode
from tests.support.programs import run


def scpl_dist(
    *arguments: str | Path, code: int = 0, timeout_s: float = 150, faults: Sequence[Fault] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``scpl-dist`` to its end and check its exit code.

    Raises:
        AssertionError: another exit code; the message has all output.
    """
    command = (sys.executable, "-m", "scpl_dist", *arguments)
    return run(*command, env=encode(*faults), code=code, limit_s=timeout_s)


def called(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The same by a call in this process, which has imported torch: for what starts no process.

    Raises:
        AssertionError: another exit code; the message has all output.
    """
    words = ["scpl-dist", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    ended = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", words),
        patch("os._exit", sys.exit),  # it would end the tests, and without a word
    ):
        try:
            cli.main()
        except SystemExit as end:
            ended = end.code if isinstance(end.code, int) else int(end.code is not None)
    printed = f"{out.getvalue()}\n{err.getvalue()}"
    assert ended == code, f"exit code {ended} instead of {code}\n{printed}"
    return subprocess.CompletedProcess(words, ended, out.getvalue(), err.getvalue())
