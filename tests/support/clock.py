"""A wall clock that jumps: for processes of a test, at the moment that the test says, and for nobody else.

A process namespace cannot shift the wall clock, and shifting that of the machine would hit everything on it. So a
small library is put in front of libc's (`clock.c`): with it both the time that a process reads and the waits that
end at a time of day follow the jump, also those that have begun before it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from tests.support.programs import find, run

HOUR = 3600
SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The wall clock of all processes that are started with `environment`.

    Args:
        folder: for the library, and for the file that the processes share.
    """

    def __init__(self, folder: Path) -> None:
        library, shared = folder / "clock.so", folder / "clock"
        compiler = find("cc", "apt-get install gcc libc6-dev")
        options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o"]
        run(compiler, *options, library, SOURCE, "-ldl", "-pthread", code=0)
        shared.write_bytes(struct.pack("=q", 0))
        with shared.open("r+b") as file:
            self._ahead = mmap.mmap(file.fileno(), 8)
        loaded = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
        self.environment = {"LD_PRELOAD": loaded, "JUMPING_CLOCK": str(shared)}

    def jump(self, hours: float) -> None:
        """Let it be so many hours later than it is, or earlier."""
        self._ahead[:] = struct.pack("=q", int(hours * HOUR))

    def now(self) -> float:
        """What the processes read."""
        ahead: int = struct.unpack("=q", self._ahead)[0]
        return time.time() + ahead
