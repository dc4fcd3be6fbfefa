"""The process that started the coordinator, as that sees it: lines of JSON on a socket, which is standard input."""

from __future__ import annotations

import contextlib
import json
import os

from scpl_dist.coordinator.events import Event, Exited, Garbage, LauncherLost, Signal

_WORKING = b'{"event": "working"}\n'


class Launcher:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""
        self._unsaid = b""  # what it has no room for, as it does not read
        os.set_blocking(descriptor, False)

    def events(self) -> list[Event]:
        """What the launcher has said since the last call; its death is its last word."""
        try:
            chunk = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:  # it ended with words that it had not read
            chunk = b""
        if not chunk:
            return [LauncherLost()]
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [_parsed(line) for line in lines]

    def replace(self, rank: int, pid: int | None) -> None:
        """Have a worker started in place of this one, which is ended if it still runs."""
        text = json.dumps({"event": "replace", "rank": rank, "pid": pid})
        self._say(text.encode() + b"\n")

    def working(self) -> None:
        """Let it know that there are workers, perhaps none of its own; to be said again and again."""
        self._say(b"" if self._unsaid else _WORKING)

    def _say(self, line: bytes) -> None:
        self._unsaid += line
        with contextlib.suppress(OSError):  # it has ended, which is an event of its own, or hears it later
            self._unsaid = self._unsaid[os.write(self.descriptor, self._unsaid) :]


def _parsed(line: bytes) -> Event:
    try:
        value = json.loads(line)
        if value["event"] == "signal":
            return Signal("launcher", int(value["number"]))
        return Exited(int(value["rank"]), int(value["code"]), int(value["pid"]))
    except (ValueError, KeyError, TypeError):
        return Garbage()
