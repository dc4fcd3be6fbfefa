"""``metrics.jsonl``: one JSON object a line, every loss in full precision.

It only grows, until a run goes on from a checkpoint: then the rows after it are dropped, as their steps are trained
again. One process writes at a time: the coordinator, and between two of them the launcher. Rows of steps are written
together, many at a time; whoever publishes a checkpoint calls `flush` before, so that a run which goes on from there
has all rows up to it, whatever ended the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 18  # bytes, more than a thousand rows
_ENCODER = json.JSONEncoder(allow_nan=False)


def begin_of(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """When the training began, in seconds since the epoch of the clock; None if no row tells."""
    return next((row["time"] for row in rows if row["event"] == "start" and "time" in row), None)


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._waiting: list[str] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and write it with all before it; that of a step waits for the next such row, or for `flush`."""
        self._waiting.append(_ENCODER.encode(row))
        if row["event"] != "train":
            self.flush()

    def flush(self) -> None:
        """Write all rows so far, whole ones only: a coordinator that is killed loses none of them.

        The file stays open until `close`: on a network file system, opening it each time takes milliseconds. OSError
        if they could not be written.
        """
        if not self._waiting:
            return
        rows, self._waiting = self._waiting, []
        if self._file is None:
            self._file = self.path.open("ab")
        self._file.write("".join(f"{row}\n" for row in rows).encode())
        self._file.flush()

    def close(self) -> None:
        """Write what waits, and close the file, before another process may `rewind` it."""
        with contextlib.suppress(OSError):  # the run is over, or goes on without what was not written
            self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def last_step(self, frozen: bool = False) -> int:
        """The last step that all stages of a group have finished, by the end of the file; -1 if there is none.

        Where blocks are `frozen`, stages without a loss are silent, and it is the last step of any other.
        """
        if not self.path.exists():
            return -1
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - _CHUNK))
            rows = [_row(line) for line in file.read().split(b"\n")]
        stages = len(
            {row["stage"] for row in rows if row.get("event") == "train"}
        )  # of a group begun before these
        last: dict[int, int] = {}  # by stage of a group
        found = -1
        for row in rows:
            if row.get("event") == "start":
                stages, last = row["stages"], {}
            elif row.get("event") == "train":
                last[row["stage"]] = int(row["step"])
                if frozen:
                    found = max(last.values())
                elif len(last) == stages:
                    found = min(last.values())
        return found

    def _begin_of_doubt(self, file: BinaryIO, step: int, epoch: int) -> int:
        """Where the rows begin that may have to go: a whole chunk before it has earlier steps only.

        Stages are some steps apart, never thousands of rows, and so a long file need not be read.
        """
        end = begin = self.path.stat().st_size
        while begin > 0:
            begin = max(0, end - _CHUNK)
            file.seek(begin)
            lines = file.read(end - begin).split(b"\n")
            whole = [_row(line) for line in lines[1:-1]]
            steps = [row for row in whole if row.get("event") == "train"]
            if steps and all(_stays(row, step, epoch) for row in whole if row):
                return begin + len(lines[0]) + 1
            end = begin + len(lines[0]) + 1 if begin else 0
        return 0

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the rows that a run which goes on from a checkpoint writes again.

        Also a last row that a crash cut off. Every step is there once, whatever happened on the way.
        """
        self.close()
        if not self.path.exists():
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with self.path.open("rb") as old, temporary.open("wb") as new:
            begin = self._begin_of_doubt(old, step, epoch)
            old.seek(0)
            for place in range(0, begin, _CHUNK):
                new.write(old.read(min(_CHUNK, begin - place)))
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
