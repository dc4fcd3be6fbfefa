"""The folder of a run: everything that is known about it afterwards.

JSON files are replaced in one step, so a reader sees the old content or the new one, never half of it.
``metrics.jsonl`` only grows, until a run goes on from a checkpoint: then the rows after it are dropped, as their
steps are trained again.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scpl_dist.run.config import Config
from scpl_dist.run.failures import Failure, Outcome
from scpl_dist.storage.durable import write_text

LEFTOVERS = frozenset({"log", "config.toml"})
"""What a launcher may have put there before the run starts."""


class RunFolder:
    """A run's folder and its files.

    Args:
        path: created if it does not exist.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # No name that two processes could share: in containers they may have the same process id.
            with tempfile.TemporaryFile(dir=path):
                pass
            self.log.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--run-dir {path}: not writable ({error.strerror}): choose another folder"
            ) from None

    @classmethod
    def create(cls, path: str | Path | None, config: Config, resume: bool = False) -> RunFolder:
        """The folder of a new run, or with `resume` of an old one, with its ``config.toml``.

        Args:
            path: None makes ``runs/<time>-<method>``.
            config: the run.
            resume: whether the run in the folder goes on.

        Raises:
            ValueError: the folder cannot be written, or has another run in it.
        """
        path = _fresh(config.run.method) if path is None else Path(path)
        try:
            used = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        except OSError as error:
            raise ValueError(
                f"--run-dir {path}: not a folder ({error.strerror}): choose another one"
            ) from None
        if not resume and set(used) - LEFTOVERS:
            raise ValueError(
                f"--run-dir {path}: not empty ({', '.join(used[:5])}): choose another folder, or --resume auto to "
                "go on with the run that is in it"
            )
        folder = cls(path)
        folder.write_text("config.toml", config.to_toml())
        return folder

    @property
    def log(self) -> Path:
        """The folder of the workers' logs."""
        return self.path / "log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other launchers out of the folder; the lock goes with this process, however it ends.

        Raises:
            ValueError: a run is in progress in it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--run-dir {self.path}: a run is in progress in this folder: wait for its end, or stop it first"
                ) from None
            yield

    def log_size(self, name: str) -> int:
        """Bytes in a worker's log; the name is that of its seat."""
        path = self.log / f"{name}.log"
        return path.stat().st_size if path.exists() else 0

    def last_words(self, name: str, begin: int = 0) -> str | None:
        """The last traceback, of Python or of faulthandler, in a worker's log after its first `begin` bytes."""
        try:
            content = (self.log / f"{name}.log").read_bytes()
        except OSError:
            return None
        text = content[begin:].decode(errors="replace")[-8000:]
        begin = max(text.rfind("Traceback (most recent call last)"), text.rfind("Fatal Python error"))
        return text[begin:] if begin >= 0 else None

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``; floats keep their full precision."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def last_step(self, stages: int) -> int:
        """The last step that all stages have finished, by the end of ``metrics.jsonl``; -1 if there is none."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return -1
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 18)))
            rows = [_row(line) for line in file.read().split(b"\n")]
        last: dict[int, int] = {}
        for row in rows:
            if row.get("event") == "train":
                last[row["stage"]] = max(row["step"], last.get(row["stage"], -1))
        return min(last.values()) if len(last) == stages else -1

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the rows of ``metrics.jsonl`` that a run which goes on from a checkpoint writes again.

        These are the steps from `step` on, the evaluations of the epochs from `epoch` on and later checkpoints, and
        a last row that a crash cut off. Every step is there once, whatever happened on the way.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        temporary = path.with_name(".metrics.jsonl.tmp")
        with path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(line for line in old if _stays(_row(line), step, epoch))
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON file in one step."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file in one step, durably."""
        write_text(self.path / name, text)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file, or None if it does not exist.

        Raises:
            ValueError: it is no JSON object.
        """
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path / name}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path / name}: not a JSON object")
        return value

    def remove(self, *names: str) -> None:
        """Remove files that may exist."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def finish(self, outcome: Outcome) -> None:
        """Write ``result.json``, if there is a result, and then ``exit.json``."""
        if outcome.result is not None:
            self.write("result.json", outcome.result)
        failure = outcome.failure
        keys = ("stage", "replica", "host", "step", "micro_batch", "pid", "rank", "phase", "traceback")
        row: dict[str, Any] = {"code": outcome.code, "reason": outcome.reason}
        if failure is not None:
            row |= {"reason": failure.message, "cause": failure.cause, "advice": failure.advice}
            row |= {key: getattr(failure, key) for key in keys} | {"log": str(self.log)}
        else:
            row |= dict.fromkeys(keys) | {"log": str(self.log)}
        self.write("exit.json", row)

    def fail(self, code: int, reason: str, cause: str = "") -> int:
        """Write an ``exit.json`` for a run that nobody else could conclude; returns the code."""
        failure = Failure(cause, reason, "") if cause else None
        self.finish(Outcome(code, reason, failure))
        return code


def _fresh(method: str) -> Path:
    """A folder of its own for a run without a name, also if another one starts in the same second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(method).name.rpartition(':')[2]}"
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be made ({error.strerror}): choose a folder with --run-dir"
            ) from None
        return path
    raise AssertionError


def _row(line: bytes) -> dict[str, Any]:
    """A row of ``metrics.jsonl``; empty if it was cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stays(row: dict[str, Any], step: int, epoch: int) -> bool:
    """Whether a row still holds for a run that goes on from this step in this epoch."""
    match row.get("event"):
        case None:
            return False
        case "train":
            return bool(row["step"] < step)
        case "eval":
            return bool(row["epoch"] < epoch)
        case "checkpoint":
            return bool(row["step"] <= step)
        case _:
            return True
