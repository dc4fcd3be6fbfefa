"""The folder of a run: everything that is known about it afterwards.

JSON files are replaced in one step, so a reader sees the old content or the new one, never half of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure, Outcome
from scpl_dist.storage import lock
from scpl_dist.storage.checkpoints import steps
from scpl_dist.storage.durable import write_text
from scpl_dist.storage.metrics_log import MetricsLog

# What a launcher may have put there before the run starts.
_LEFTOVERS = {*lock.FILES, "log", "config.toml"}
_LABELS = "labels.json"
_PREPROCESSING = "preprocessing.json"


class RunFolder:
    """A run's folder and its files. Made like this it is for reading: nothing is written, nothing has to exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log"
        self.metrics = MetricsLog(path / "metrics.jsonl")

    @classmethod
    def open_for_writing(cls, path: Path) -> RunFolder:
        """The folder, made if need be, after a try that it can be written; `ValueError` if it cannot."""
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            # No name that two processes could share: in containers they may have the same process id.
            with tempfile.TemporaryFile(dir=path):
                pass
            folder.log.mkdir(exist_ok=True)
        except OSError as error:
            reason = f"not writable ({error.strerror})"
            raise ValueError(f"--run-dir {path}: {reason}: choose another folder") from None
        return folder

    @classmethod
    def create(cls, path: str | Path | None, config: Config, resume: bool = False) -> RunFolder:
        """The folder of a new run, or with `resume` of an old one; what is in it stays until it is `taken`.

        `path` None makes ``runs/<time>-<name>``; `ValueError` if it cannot be written, or has another run in it.
        """
        path = (
            _fresh(config.run.name or Path(config.run.method).name.rpartition(":")[2])
            if path is None
            else Path(path)
        )
        try:
            used = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        except OSError as error:
            reason = f"not a folder ({error.strerror})"
            raise ValueError(f"--run-dir {path}: {reason}: choose another one") from None
        if not resume and set(used) - _LEFTOVERS:
            raise ValueError(
                f"--run-dir {path}: not empty ({', '.join(used[:5])}): choose another folder, or --resume auto to "
                "go on with the run that is in it"
            )
        return cls.open_for_writing(path)

    @contextlib.contextmanager
    def taken(
        self, config: Config, labels: dict[str, list[int]] | None = None, seen: Sequence[Path] = ()
    ) -> Iterator[None]:
        """Keep others out, and make the folder this run's; the lock goes with this process, however it ends.

        `labels` are what it took long to find in the data set, for whoever opens that again. `seen` are the checkpoints
        that were there when that to go on from was chosen.
        """
        with lock.locked(self.path):
            new = [path.name for path in steps(self.path) if path not in seen]
            if new:
                raise ValueError(
                    f"--run-dir {self.path}: another run has written {', '.join(new)} while this one started: start "
                    "again to go on from there"
                )
            try:
                write_text(self.path / "config.toml", config.to_toml())
                (self.path / _LABELS).unlink(missing_ok=True)
                if labels:
                    write_text(self.path / _LABELS, json.dumps(labels))
            except OSError as error:
                raise ValueError(
                    f"--run-dir {self.path}: config.toml cannot be written ({error.strerror}): free some space, or "
                    "choose another folder"
                ) from None
            yield

    def check(self) -> None:
        """ValueError if no run has ever begun in it."""
        if not (self.path / "config.toml").is_file():
            raise ValueError(f"{self.path} is no run folder: it has no config.toml")

    def in_progress(self) -> dict[str, Any]:
        """What the coordinator of a run has said of itself; ValueError if none is at work in the folder."""
        self.check()
        run = self.read("run.json")
        if run is None or self.read("exit.json") is not None:
            raise ValueError(f"{self.path}: no run is in progress there")
        return run

    def labels(self) -> dict[str, list[int]]:
        """Of the data set, as far as `taken` was given them."""
        return self.read(_LABELS) or {}

    def keep_preprocessing(self, described: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Keep what makes inputs of raw ones, with the files that `save` writes into the folder that it is given."""
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as made:
            save(Path(made))
            for file in sorted(Path(made).iterdir()):
                self.tokenizer.mkdir(exist_ok=True)
                os.replace(file, self.tokenizer / file.name)
        self.write(_PREPROCESSING, described)

    def preprocessing(self) -> dict[str, Any] | None:
        """What `keep_preprocessing` was told; None in a run of before."""
        return self.read(_PREPROCESSING)

    @property
    def tokenizer(self) -> Path:
        """The folder of its files, which is there if it has some."""
        return self.path / "tokenizer"

    def log_size(self, name: str) -> int:
        """Bytes in a worker's log; the name is `WorkerId.file`."""
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

    def write(self, name: str, value: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file, or None if it does not exist; `ValueError` if it is no JSON object."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path / name}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path / name}: not a JSON object")
        return value

    def clear(self) -> None:
        """Remove what an earlier start has said of itself: whoever waits for a file waits for that of this one."""
        for name in ("run.json", "exit.json", "result.json"):
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
        row |= {key: getattr(failure, key, None) for key in keys}
        row |= {"survived": list(outcome.survived), "final": outcome.final}
        self.write("exit.json", row | {"log": str(self.log)})

    def fail(self, code: int, reason: str, cause: Cause | None = None) -> None:
        """Write an ``exit.json`` for a run that nobody else could conclude."""
        self.finish(Outcome(code, reason, Failure(cause, reason, "") if cause else None))


def _fresh(name: str) -> Path:
    """A folder of its own for a run that was given none, also if another one starts in the same second.

    ``runs/latest`` leads to it.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    number = 1
    while True:
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            reason = f"cannot be made ({error.strerror})"
            raise ValueError(f"{path}: {reason}: choose a folder with --run-dir") from None
    link = path.with_name(f".latest.{path.name}")
    with contextlib.suppress(OSError):  # a convenience, which not every file system has
        try:
            link.symlink_to(path.name)
            link.replace(path.with_name("latest"))
        finally:
            link.unlink(missing_ok=True)
    return path
