"""The process that started the coordinator, as that sees it: lines of JSON on a socket, which is standard input."""

from __future__ import annotations

import contextlib
import json
import os

from scpl_dist.coordinator.events import Event, Exited, Garbage, LauncherLost, Signal


class Launcher:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""
        os.set_blocking(descriptor, False)

    def events(self) -> list[Event]:
        """What the launcher has said since the last call; its death is its last word."""
        try:
            chunk = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:  # it ended with wishes that it had not read
            chunk = b""
        if not chunk:
            return [LauncherLost()]
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [_parsed(line) for line in lines]

    def replace(self, rank: int, pid: int | None) -> None:
        """Have a worker started in place of this one, which is ended if it still runs."""
        text = json.dumps({"event": "replace", "rank": rank, "pid": pid})
        with contextlib.suppress(OSError):  # it has ended, which is an event of its own
            os.write(self.descriptor, text.encode() + b"\n")


def _parsed(line: bytes) -> Event:
    try:
        value = json.loads(line)
        if value["event"] == "signal":
            return Signal("launcher", int(value["number"]))
        return Exited(int(value["rank"]), int(value["code"]), int(value["pid"]))
    except (ValueError, KeyError, TypeError):
        return Garbage()
