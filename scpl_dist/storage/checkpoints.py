"""Checkpoints: one file for each block, and a manifest that makes them one checkpoint.

    RUN/checkpoints/step-40.<unique>.tmp/block-000.pt  written by the stages after the marker reached them
    RUN/checkpoints/step-40/manifest.json              written by the coordinator when all parts are there; then renamed
    RUN/checkpoints/best, latest                       text files with the name of a checkpoint; latest is moved last

Files belong to blocks, not to stages, so a run can go on with another number of stages. Parts are loaded with
``weights_only=True``; nothing in them can run code. A committed folder is never changed, only renamed and removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scpl_dist.storage.durable import sync_folder, write_text


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the file and the reason."""


def folder_for(run_dir: Path, step: int, unique: str = "") -> Path:
    """Folder that the parts of a checkpoint are written into before it is committed.

    `unique` tells apart the checkpoints of one step, so that a late writer of a dead start cannot spoil a new one.
    """
    return run_dir / "checkpoints" / ".".join(filter(None, (f"step-{step}", unique, "tmp")))


def folder_of(run_dir: Path, step: int) -> Path:
    """Folder of a committed checkpoint."""
    return run_dir / "checkpoints" / f"step-{step}"


def commit(folder: Path, manifest: dict[str, Any], keep: int) -> Path:
    """Make the parts in a folder a checkpoint: manifest, rename, ``best``, ``latest``, then drop old ones.

    The best one and the `keep` newest that are "due" stay: that were written because it was time, not only because
    their epoch was the best. Returns the final folder; `CheckpointError` if a part is not there as a whole.
    """
    parent = folder.parent
    final = folder_of(parent.parent, manifest["step"])
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    for entry in manifest["files"]:  # whatever took a part away, `latest` must not name the rest
        compare(folder / entry["name"], entry, hashing=False)
    if final.exists():  # the same step again: the older one goes only after the newer one is there
        _set_aside(final, "old.tmp")
    os.rename(folder, final)
    sync_folder(parent)
    if manifest.get("best"):
        write_text(parent / "best", final.name + "\n")
    write_text(parent / "latest", final.name + "\n")
    found = steps(parent.parent)
    due = [path for path in found if _is_due(path)]
    kept = {final, *due[-keep:], *named(parent.parent, "best")}
    for checkpoint in set(found) - kept:
        _set_aside(checkpoint, "old.tmp")
    remove(parent.glob("step-*.old.tmp"))  # somebody may be reading it: then it is removed later
    return final


def _set_aside(checkpoint: Path, suffix: str) -> None:
    """Rename it, so that it is no checkpoint any more; in one step, as removing takes several."""
    aside = checkpoint.with_name(f"{checkpoint.name}.{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)


def _is_due(checkpoint: Path) -> bool:
    try:
        return bool(manifest_of(checkpoint).get("due", True))
    except CheckpointError:
        return False  # damaged: it must not push a good one out


def named(run_dir: Path, name: str) -> list[Path]:
    """The checkpoint that ``best`` or ``latest`` names: one path, or none if there is no such file."""
    parent = run_dir / "checkpoints"
    try:
        return [parent / (parent / name).read_text(encoding="utf-8").strip()]
    except (OSError, UnicodeDecodeError):
        return []


def steps(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit() and path.is_dir()), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def clear(run_dir: Path, chosen: Path | None) -> None:
    """Before a run goes on: remove half-written checkpoints, put those after the chosen one aside.

    They are damaged, or belong to steps that are trained again; left in place they would push out good ones.
    """
    remove(unfinished(run_dir))
    for checkpoint in steps(run_dir):
        if chosen is not None and _step_of(checkpoint) > _step_of(chosen):
            _set_aside(checkpoint, "aside")


def unfinished(run_dir: Path) -> list[Path]:
    """What has been written of checkpoints that are not complete now."""
    return [*(run_dir / "checkpoints").glob("step-*.tmp")]


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def find(run_dir: Path, name: str | None = None) -> Path:
    """A checkpoint of a run, such as "step-40", "best" or "latest"; None takes the newest.

    `CheckpointError` if there is none at all, `ValueError` if there is none of this name.
    """
    there = steps(run_dir)
    if not there:
        raise CheckpointError(f"{run_dir} has no checkpoint: was the run ended before its first one?")
    if name is None:
        return there[-1]
    found = named(run_dir, name) if name in ("best", "latest") else [run_dir / "checkpoints" / name]
    for checkpoint in found:
        if checkpoint.is_dir():
            return checkpoint
    names = ", ".join(checkpoint.name for checkpoint in there)
    raise ValueError(f"--checkpoint {name}: {run_dir} has no such checkpoint; it has {names}")


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint; `CheckpointError` if it is missing, or has not what it must have."""
    path = checkpoint / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sound = {"epoch", "step", "batch"} <= manifest["position"].keys()
        sound &= all({"name", "bytes", "sha256"} <= entry.keys() for entry in manifest["files"])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: not a manifest of a run")
    return manifest


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written; else `CheckpointError` says why."""
    manifest = manifest_of(checkpoint)
    paths = [checkpoint / str(entry["name"]) for entry in manifest["files"]]
    for path in paths:
        if path.parent != checkpoint or path.name in ("", ".", ".."):
            raise CheckpointError(f"{path}: lies outside the checkpoint")
    with ThreadPoolExecutor(8) as pool:  # a file server and several cores are faster than one of them
        list(pool.map(compare, paths, manifest["files"]))
    return manifest


def compare(path: Path, entry: Mapping[str, Any], hashing: bool = True) -> None:
    """Compare a file's size, and if wanted every byte of it, with its entry in the manifest."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes instead of {entry['bytes']}")
        if not hashing:
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not that of the manifest")
