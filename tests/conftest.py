"""What holds for every test: nothing that it starts outlives it, and nothing is skipped unseen."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

GRACE_S = 5.0
"""For processes and threads that are about to end."""
SHAPING = (
    "FORCE_COLOR",
    "NO_COLOR",
    "CLICOLOR_FORCE",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "COLUMNS",
    "LINES",
)
"""Variables that change what programs print."""


def pytest_configure() -> None:
    """Let the tests end what they have started when this process is stopped, and find orphans; one terminal for all."""
    os.environ["TERM"] = "xterm-256color"
    for name in SHAPING:
        os.environ.pop(name, None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)
    if sys.platform == "linux":  # orphans of what tests start become children of this process
        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two tests at a time for whole folders, as each starts processes of its own; no extra process for single files."""
    return 2 if all(Path(place).is_dir() for place in config.args) else 0


def _stop(number: int, frame: FrameType | None) -> None:
    pytest.exit(f"stopped by {signal.Signals(number).name}")


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Fail a test that leaves processes behind, or threads that keep a process from ending; end the processes."""
    processes, threads = children(), set(threading.enumerate())

    def left() -> list[str]:
        names = [name for process in children() - processes if (name := running(process))]
        return names + [thread.name for thread in set(threading.enumerate()) - threads if not thread.daemon]

    yield
    deadline = time.monotonic() + GRACE_S
    while left() and time.monotonic() < deadline:
        time.sleep(0.02)
    found = left()
    for process in children() - processes:
        if running(process):
            os.kill(process, signal.SIGKILL)
    assert not found, f"left over: {found}"


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Put back what a test, or a start of a run in this process, has set for processes that come after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def children() -> set[int]:
    """The processes that this one has started, or adopted."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, path.read_text().split()))
    return found


def running(process: int) -> str:
    """Command line of a child that runs; empty if it has ended, and then it is buried."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, os.WNOHANG)
    try:
        command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
    # One for all processes that multiprocessing spawns; it ends with this process.
    return "" if "multiprocessing.resource_tracker" in command else command or f"process {process}"


def skipped(terminalreporter: pytest.TerminalReporter) -> Counter[str]:
    """Why tests were skipped, and how many for each reason; without those for what the machine of CI cannot have."""
    reports = terminalreporter.stats.get("skipped", [])
    return Counter(report.longrepr[2] for report in reports if not {"gpu", "engine"} & set(report.keywords))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where CI is set, a test that is skipped is one that fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or session.exitstatus != pytest.ExitCode.OK or reporter is None:
        return
    if skipped(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what would bring the tests that were skipped."""
    reasons = skipped(terminalreporter)
    if not reasons:
        return
    terminalreporter.section(f"{reasons.total()} tests were skipped, and what would bring them")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4}  {reason.removeprefix('Skipped: ')}")
    programs = {word for reason in reasons for word in reason.partition("apt-get install ")[2].split()}
    if programs:
        terminalreporter.line(f"all of these programs: apt-get install {' '.join(sorted(programs))}")
    if os.environ.get("CI"):
        terminalreporter.line("CI is set, so this is a failure")
