"""Programs that tests run: found beside the interpreter or on PATH.

A missing program skips the test, but fails it where CI is set: there, nothing may be skipped unseen.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def missing(reason: str) -> None:
    """Skip the running test, or fail it in CI.

    Raises:
        AssertionError: CI is set.
    """
    if os.environ.get("CI"):
        raise AssertionError(f"{reason}; CI must have it")
    pytest.skip(reason)


def find(program: str, install: str) -> str:
    """Path of a program.

    Args:
        program: name of the executable.
        install: how to get it, for the message.
    """
    path = shutil.which(
        program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if path is None:
        missing(f"{program} is not installed: {install}")
        return ""
    return path


def need_root() -> None:
    """The test makes network namespaces, which only root can."""
    if os.geteuid() != 0:
        missing("network namespaces need root")


def until_nothing(missing: Callable[[], object], seconds: float = 90) -> None:
    """Ask until nothing is missing any more.

    Args:
        missing: what still is; anything false ends the wait.
        seconds: longest time.

    Raises:
        AssertionError: something still is missing; the message says what.
    """
    deadline = time.monotonic() + seconds
    while left := missing():
        assert time.monotonic() < deadline, f"after {seconds} s: {left}"
        time.sleep(0.1)
