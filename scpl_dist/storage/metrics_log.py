"""``metrics.jsonl``: one JSON object a line, every loss in full precision.

It only grows, until a run goes on from a checkpoint: then the rows after it are dropped, as their steps are trained
again. One process writes at a time: the coordinator, and between two of them the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; when this returns it is in the file, so a coordinator that is killed loses none.

        The file stays open until `close`: on a network file system, opening it for each row takes milliseconds.
        """
        text = json.dumps(row, allow_nan=False)
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a buffer of one line
        self._file.write(text + "\n")

    def close(self) -> None:
        """Close the file, before another process may `rewind` it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been reported by `append`
                self._file.close()
            self._file = None

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def last_step(self, stages: int) -> int:
        """The last step that all stages have finished, by the end of the file; -1 if there is none."""
        if not self.path.exists():
            return -1
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - (1 << 18)))
            rows = [_row(line) for line in file.read().split(b"\n")]
        last = {row["stage"]: int(row["step"]) for row in rows if row.get("event") == "train"}
        return min(last.values()) if len(last) == stages else -1

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the rows that a run which goes on from a checkpoint writes again.

        Also a last row that a crash cut off. Every step is there once, whatever happened on the way.
        """
        self.close()
        if not self.path.exists():
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with self.path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(line for line in old if _stays(_row(line), step, epoch))
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)


def _row(line: bytes) -> dict[str, Any]:
    """A row; empty if it was cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stays(row: dict[str, Any], step: int, epoch: int) -> bool:
    """Whether a row still holds for a run that goes on from this step in this epoch."""
    match row:
        case {"event": "train", "step": trained}:
            return bool(trained < step)
        case {"event": "checkpoint", "step": saved}:
            return bool(saved <= step)
        case {"event": "eval", "epoch": evaluated}:
            return bool(evaluated < epoch)
    return "event" in row
