"""Replays what a coordinator wrote into ``RUN/log/events.jsonl`` when its run failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgpack

from scpl_dist.control.codec import decode
from scpl_dist.coordinator.event_log import Origin, plain
from scpl_dist.coordinator.events import Event
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run.config import Config
from tests.support import invariants

EVENTS = {kind.__name__: kind for kind in get_args(Event)}


def replay(path: Path) -> Coordinator:
    """A new coordinator that has handled all events of a log, and commanded after each what the log says."""
    origin, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert rows[0]["number"] == 1, "the log does not reach back to the first event"
    coordinator = Coordinator(Config.model_validate(origin.pop("config")), Origin(**origin))
    for row in rows:
        commands = coordinator.handle(event(row["event"]), row["now"])
        invariants.check(coordinator)
        assert coordinator.number == row["number"]
        # As texts, in which a NaN equals a NaN.
        assert json.dumps(commands, default=plain) == json.dumps(row["commands"]), row
    return coordinator


def event(row: dict[str, Any]) -> Event:
    fields = {key: value for key, value in row.items() if key != "is"}
    if "peer" in fields:
        fields["peer"] = bytes.fromhex(fields["peer"])
    if isinstance(fields.get("message"), dict):
        fields["message"] = decode(msgpack.packb(fields["message"]))
    found: Event = EVENTS[row["is"]](**fields)
    return found
