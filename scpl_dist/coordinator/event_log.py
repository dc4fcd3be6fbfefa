"""The last events that a coordinator handled, for a look at a run that failed and for its replay.

``RUN/log/events.jsonl`` begins with what the coordinator was made from; then there is a line for each event, with its
number, the monotonic time and the commands that it caused. An event that is the first of a run has the number 1: if the
log begins later, the earlier ones were dropped and it can be read, but not replayed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from scpl_dist.control.codec import to_plain
from scpl_dist.control.messages import Message
from scpl_dist.coordinator.events import Command, Event
from scpl_dist.coordinator.window import WINDOW
from scpl_dist.run.config import Config

KEPT = 4096  # events; a worker causes some two a second and one for each item


@dataclass(frozen=True, slots=True)
class Origin:
    """What a coordinator is made from, beside the configuration."""

    generation: str  # unique name of this start of the run
    window: int = WINDOW  # most items that stage 0 may have and not have begun
    resume: dict[str, Any] | None = None  # the "position" of a checkpoint's manifest
    restore: str = ""  # folder of that checkpoint, for the workers
    folder: str = ""  # run folder, for workers that do not know it
    replaceable: bool = True  # whether a worker may come in place of a lost one
    led: bool = False  # whether the launcher is the worker of rank 0
    restarted: tuple[str, ...] = ()  # causes of the failures that the run has survived before


class EventLog:
    """A bounded log; what it keeps is only turned into text when somebody asks."""

    def __init__(self, config: Config, origin: Origin) -> None:
        self._origin = {"config": config.model_dump(mode="json")} | asdict(origin)
        self._handled: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, number: int, now: float, event: Event, commands: list[Command]) -> None:
        """Commands may still be added to the list."""
        self._handled.append({"number": number, "now": now, "event": event, "commands": commands})

    def lines(self) -> Iterator[str]:
        """Of the file. Losses may be NaN or infinite there, which JSON does not know but Python's reader does."""
        yield json.dumps(self._origin)
        for row in self._handled:
            yield json.dumps(row, default=plain)


def plain(value: Any) -> Any:
    """What `json` does not know of an event or a command; messages are as on the wire."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Message):
        return to_plain(value)
    return {"is": type(value).__name__} | {part.name: getattr(value, part.name) for part in fields(value)}
