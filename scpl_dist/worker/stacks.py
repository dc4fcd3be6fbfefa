"""The stacks of a worker that stands still, written where they can be read after it was killed.

A process that hangs cannot report on itself, and one that holds the interpreter lock cannot even run Python code.
So the stacks are written by a timer thread of C that is set again with every item, by a signal from outside, and on
request of the coordinator: whichever still works.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from pathlib import Path

SIGNAL = signal.SIGUSR1  # makes a worker write its stacks, also while it holds the interpreter lock


class Stacks:
    def __init__(self, path: Path, timeout_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._timeout_s = 0.8 * timeout_s  # the timer must be faster than whoever ends the worker
        self._armed = -timeout_s
        faulthandler.register(SIGNAL, self._file, all_threads=True)

    def rearm(self) -> None:
        """Progress was made. Cheap: the timer is set again once in a while, not at every call."""
        now = time.monotonic()
        if now - self._armed >= 0.05 * self._timeout_s:
            self._armed = now
            faulthandler.dump_traceback_later(self._timeout_s, repeat=False, file=self._file)

    def write(self, reason: str) -> None:
        self._file.write(f"{time.strftime('%H:%M:%S')} {reason}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
