"""Programs that tests run: found, started so that they behave the same wherever the tests run, and never left behind.

A missing program skips the test, but fails it where CI is set: there, nothing may be skipped unseen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import psutil
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
    """The test makes network namespaces or mounts a file system, which only root can."""
    if os.geteuid() != 0:
        missing("network namespaces and file systems need root")


class Program:
    """A program that runs, with everything that it starts. Use it as a context: nothing of it is left afterwards.

    It has a session of its own, and the signals that this process ignores, as under nohup or behind `&`, are not
    ignored in it: a shell script could not even trap them. What it prints goes into files, so it never waits for a
    reader, and can be read at any time.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        env: variables to set or change.
        stdin: as for `subprocess.Popen`.
        log: file that its output is appended to; a temporary one if there is none.
        apart: keep standard error apart from standard output.
    """

    def __init__(
        self,
        *command: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        log: Path | None = None,
        apart: bool = False,
    ) -> None:
        self._out = _opened(log)
        self._err = _opened(None) if apart else None
        with _no_signal_ignored():
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd,
                env=os.environ | dict(env or {}),
                stdin=stdin,
                stdout=self._out,
                stderr=self._err or subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        """What it has printed so far: standard output, and standard error where that is not kept apart."""
        return _content(self._out)

    @property
    def errors(self) -> str:
        """What it has printed so far on standard error, where that is kept apart."""
        return _content(self._err) if self._err is not None else ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, not to what it has started."""
        self.process.send_signal(number)

    def wait(self, limit_s: float = 120) -> int:
        """Its exit code.

        Raises:
            AssertionError: it has not ended in time; the message has its output.
        """
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {limit_s} s:\n{self.output}{self.errors}") from None

    def wait_for(self, text: str, count: int = 1, limit_s: float = 120) -> None:
        """Until it has printed a text so many times.

        Raises:
            AssertionError: it has ended before, or the time is over; the message has its output.
        """

        def missing() -> str:
            ended = self.ended
            printed = self.output
            if printed.count(text) >= count:
                return ""
            assert not ended, f"ended with code {self.process.returncode}:\n{printed}{self.errors}"
            return f"{text!r} is not {count} times in:\n{printed}{self.errors}"

        until_nothing(missing, limit_s)

    def close(self) -> None:
        """Kill it, its process group, and its descendants in other groups."""
        if self._out.closed:
            return
        try:
            descendants = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            descendants = []
        with contextlib.suppress(ProcessLookupError):  # nobody is in the group any more
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        for file in (self.process.stdin, self._out, self._err):
            if file is not None:
                file.close()


def run(
    *command: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    code: int | None = None,
    limit_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        env: variables to set or change.
        code: the exit code that it must have, None for any.
        limit_s: longest time.

    Raises:
        AssertionError: another exit code, or no end in time; the message has all output.
    """
    with Program(*command, cwd=cwd, env=env, apart=True) as program:
        ended = program.wait(limit_s)
        out, err = program.output, program.errors
    assert code in (None, ended), f"exit code {ended} instead of {code}\n{out}\n{err}"
    return subprocess.CompletedProcess([str(word) for word in command], ended, out, err)


def until_nothing(missing: Callable[[], object], limit_s: float = 90) -> None:
    """Ask until nothing is missing any more.

    Args:
        missing: what still is; anything false ends the wait.
        limit_s: longest time.

    Raises:
        AssertionError: something still is missing; the message says what.
    """
    deadline = time.monotonic() + limit_s
    while left := missing():
        assert time.monotonic() < deadline, f"after {limit_s} s: {left}"
        time.sleep(0.05)


@contextlib.contextmanager
def _no_signal_ignored() -> Iterator[None]:
    """A signal with a handler has its default effect in a program that is started; one that is ignored stays so."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def _opened(log: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile("ab+") if log is None else log.open("ab+")


def _content(file: IO[bytes]) -> str:
    """All of a file that another process writes to; its place in the file, which they share, stays where it is."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
