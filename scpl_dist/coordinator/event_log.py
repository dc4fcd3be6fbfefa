"""The last events that a coordinator handled, for a look at a run that failed and for its replay.

``RUN/log/events.jsonl`` begins with what the coordinator was made from; then there is a line for each event, with its
number, the monotonic time and the commands that it caused. An event that is the first of a run has the number 1: if the
log begins later, the earlier ones were dropped and it can be read, but not replayed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from scpl_dist.control.codec import to_plain
from scpl_dist.control.messages import Message
from scpl_dist.coordinator.events import Command, Event

KEPT = 4096
"""Events; a worker causes some two a second and one for each item."""


class EventLog:
    """A bounded log; what it keeps is only turned into text when somebody asks."""

    def __init__(self, **origin: Any) -> None:
        self._origin = origin
        self._handled: deque[tuple[int, float, Event, list[Command]]] = deque(maxlen=KEPT)

    def add(self, number: int, now: float, event: Event, commands: list[Command]) -> None:
        """Keep an event; its commands may still be added to the list."""
        self._handled.append((number, now, event, commands))

    def lines(self) -> Iterator[str]:
        """Of the file. Losses may be NaN or infinite there, which JSON does not know but Python's reader does."""
        yield json.dumps(self._origin)
        for number, now, event, commands in self._handled:
            row = {"number": number, "now": now, "event": plain(event)}
            yield json.dumps(row | {"commands": [plain(command) for command in commands]})


def plain(value: Any) -> Any:
    """An event or a command as values of JSON; messages are as on the wire."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Message):
        return to_plain(value)
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if is_dataclass(value):
        own = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return {"is": type(value).__name__, **own}
    return value
