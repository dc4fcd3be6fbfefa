"""The process that started the coordinator, as the coordinator sees it."""

from __future__ import annotations

import json
import os

from scpl_dist.coordinator.events import Event, Exited, Garbage, LauncherLost, Signal


class Launcher:
    """The parent, as the coordinator sees it: lines of JSON on standard input."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.open = True
        self._rest = b""
        os.set_blocking(descriptor, False)

    def events(self) -> list[Event]:
        """What the launcher has said since the last call; its death is its last word."""
        try:
            chunk = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        if not chunk:
            self.open = False
            return [LauncherLost()]
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := self._parse(line)) is not None]

    @staticmethod
    def _parse(line: bytes) -> Event | None:
        try:
            value = json.loads(line)
            if value["event"] == "signal":
                return Signal("launcher", int(value["number"]))
            if value["event"] == "exited":
                return Exited(int(value["rank"]), int(value["code"]))
        except (ValueError, KeyError, TypeError):
            pass
        return Garbage()
