"""Publishes checkpoints in a thread of its own, so that a slow disk does not silence the coordinator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from scpl_dist.coordinator.events import Commit, Discard, Event


class Publisher:
    """Publishes checkpoints one after the other.

    Args:
        publish: called with each command in the thread; its result is an event.
    """

    def __init__(self, publish: Callable[[Commit | Discard], Event | None]) -> None:
        self._publish = publish
        self._commands: queue.SimpleQueue[Commit | Discard] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="publisher", daemon=True).start()

    def put(self, command: Commit | Discard) -> None:
        """Have it done; returns at once."""
        self._commands.put(command)

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def _run(self) -> None:
        while True:
            event = self._publish(self._commands.get())
            if event is not None:
                self._events.put(event)
