"""Loggers as a user writes them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Noting:
    """Notes what it hears in the file ``heard`` of the run's folder."""

    def started(self, config: dict[str, Any], run_dir: Path, step: int) -> None:
        self.file = run_dir / "heard"
        self.note(config["run.seed"], step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.note(step, values)

    def finished(self, code: int, result: dict[str, Any]) -> None:
        self.note(code, result)

    def note(self, *words: Any) -> None:
        with self.file.open("a") as file:
            print(json.dumps(words), file=file)


class Failing(Noting):
    def metrics(self, step: int, values: dict[str, float]) -> None:
        raise OSError("the server\nis gone")


class Waiting(Noting):
    """Does not end before the file ``enough`` is there."""

    def finished(self, code: int, result: dict[str, Any]) -> None:
        while not (self.file.parent / "enough").exists():
            time.sleep(0.01)
        super().finished(code, result)


GATE = threading.Event()


class Hanging(Noting):
    def metrics(self, step: int, values: dict[str, float]) -> None:
        GATE.wait(60)
        super().metrics(step, values)
