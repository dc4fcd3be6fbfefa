"""``scpl-dist checkpoint``: what checkpoints a run has, and whether they are whole."""

from __future__ import annotations

import time
from pathlib import Path

from scpl_dist.storage.checkpoints import CheckpointError, manifest_of, named, steps, verify
from scpl_dist.storage.run_folder import RunFolder

HEADINGS = ("checkpoint", "epoch", "stages", "bytes", "written", "called")


def listing(run_dir: Path) -> list[list[str]]:
    """A row of `HEADINGS` for each checkpoint, oldest first, without reading its parts."""
    return [_row(run_dir, checkpoint) for checkpoint in _all(run_dir)]


def _row(run_dir: Path, checkpoint: Path) -> list[str]:
    try:
        manifest = manifest_of(checkpoint)
        size = sum(int(entry["bytes"]) for entry in manifest["files"])
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["created"]))
        called = [name for name in ("best", "latest") if checkpoint in named(run_dir, name)]
        numbers = [str(manifest["epoch"]), str(manifest["stages"]), f"{size:,}"]
    except (CheckpointError, KeyError, TypeError) as error:
        return [checkpoint.name, "", "", "", "damaged", str(error)]
    return [checkpoint.name, *numbers, when, ", ".join(called)]


def check(run_dir: Path) -> int:
    """Print whether each checkpoint of a run is whole; returns the exit code: 1 if one is damaged."""
    code = 0
    for checkpoint in _all(run_dir):
        try:
            print(f"{checkpoint.name}: ok, {len(verify(checkpoint)['files'])} files")
        except CheckpointError as error:
            code = 1
            print(f"{checkpoint.name}: DAMAGED: {error}")
    return code


def _all(run_dir: Path) -> list[Path]:
    found = steps(run_dir)
    if not found:
        RunFolder(run_dir).check()
        raise CheckpointError(f"{run_dir} has no checkpoints")
    return found
