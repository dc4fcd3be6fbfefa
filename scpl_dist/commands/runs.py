"""``scpl-dist ls``: the runs below a folder, a row each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scpl_dist.run import config as configuration
from scpl_dist.storage.lock import is_locked
from scpl_dist.storage.run_folder import RunFolder

HEADINGS = (
    "run",
    "begun",
    "method",
    "model",
    "data",
    "stages",
    "steps",
    "accuracy",
    "best",
    "seconds",
    "state",
)
LEFT = ("run", "begun", "method", "model", "data", "state")
STATES = {0: "done", 130: "stopped", 143: "stopped"}  # by exit code


def listing(root: Path) -> list[list[str]]:
    """A row of `HEADINGS` for each run folder at or below `root`, in the order in which they were begun."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder: give one that has run folders in it")
    return [row for _, row in sorted(_rows(root))]


def _rows(root: Path) -> Iterator[tuple[float, list[str]]]:
    for file in root.rglob("config.toml"):
        folder = RunFolder(file.parent)
        try:
            config = configuration.load(file)
            result, ended = folder.read("result.json") or {}, folder.read("exit.json")
        except ValueError:  # of another program, or of another version
            continue
        begun = file.stat().st_mtime
        replicas = config.layout.world > config.pipeline.stages
        row = [
            str(folder.path.relative_to(root)),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(begun)),
            config.run.method,
            config.model.name,
            config.data.name,
            f"{config.pipeline.stages}" + (f" by {config.layout.world}" if replicas else ""),
            str(result.get("steps", "")),
            _number(result.get("accuracy_last"), ".4f"),
            _number(result.get("accuracy_best"), ".4f"),
            _number(result.get("wall_seconds"), ".1f"),
        ]
        yield begun, [*row, state_of(folder.path, ended)]


def state_of(path: Path, ended: dict[str, Any] | None) -> str:
    if is_locked(path):
        return "running"
    if ended is None:
        return "killed"
    return STATES.get(ended["code"]) or f"failed: {ended['reason']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
