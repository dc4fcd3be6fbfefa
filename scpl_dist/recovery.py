"""Which checkpoint a run goes on from: the newest one that is whole.

A checkpoint whose bytes are not those of its manifest would load without an error and train on garbage, so every
file is compared first. A damaged one is named and passed over; if none is left the run ends, because a silent
fresh start would look like a resumed one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scpl_dist.checkpoint import CheckpointError, manifest_of, steps

__all__ = ["choose", "verify"]


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and as they were written.

    Raises:
        CheckpointError: with the file and the reason.
    """
    manifest = manifest_of(checkpoint)
    position, files = manifest.get("position"), manifest.get("files")
    sound = (
        isinstance(position, dict)
        and {"epoch", "step", "batch"} <= position.keys()
        and isinstance(files, list)
    )
    if not sound or not all(
        isinstance(e, dict) and {"name", "bytes", "sha256"} <= e.keys() for e in files or []
    ):
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: not a manifest of a run")
    for entry in manifest["files"]:
        _compare(checkpoint / str(entry["name"]), checkpoint, entry)
    return manifest


def _compare(path: Path, checkpoint: Path, entry: dict[str, Any]) -> None:
    if path.parent != checkpoint or path.name in ("", ".", ".."):
        raise CheckpointError(f"{path}: lies outside the checkpoint")
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes instead of {entry['bytes']}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not that of the manifest")


def choose(run_dir: Path, resume: str, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its manifest.

    Args:
        run_dir: the run's folder.
        resume: "never", "auto" (the newest whole one, none if there has never been one) or a folder: a checkpoint,
            or a run.
        warn: called with a text about each damaged checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; or the folder is none.
    """
    if resume == "never":
        return None
    asked = run_dir if resume == "auto" else Path(resume)
    if resume != "auto" and re.fullmatch(r"step-\d+", asked.name):
        return asked, verify(asked)
    found = steps(asked)
    if not found and resume == "auto":
        return None
    problems = []
    for checkpoint in reversed(found):
        try:
            return checkpoint, verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"checkpoint {checkpoint.name} is not usable, trying the one before: {error}")
    reasons = "; ".join(problems) or "there is none"
    raise CheckpointError(
        f"no usable checkpoint in {asked}: {reasons}; --resume never starts from the beginning"
    )
