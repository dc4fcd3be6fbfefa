"""Checkpoints: one file for each block, and a manifest that makes them one checkpoint.

    RUN/checkpoints/step-40.<unique>.tmp/block-000.pt  written by the stages after the marker reached them
    RUN/checkpoints/step-40/manifest.json              written by the coordinator when all parts are there; then renamed
    RUN/checkpoints/best, latest                       text files with the name of a checkpoint; latest is moved last

Files belong to blocks, not to stages, so a run can go on with another number of stages. Parts are loaded with
``weights_only=True``; nothing in them can run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from scpl_dist.methods.unit import Unit

__all__ = [
    "CheckpointError",
    "clear",
    "commit",
    "find",
    "folder_for",
    "manifest_of",
    "named",
    "part_name",
    "read_part",
    "restore",
    "state_of",
    "steps",
    "write_part",
]

_STEP = re.compile(r"step-\d+")


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the file and the reason."""


def folder_for(run_dir: Path, step: int, unique: str = "") -> Path:
    """Folder that the parts of a checkpoint are written into before it is committed.

    Args:
        run_dir: run folder.
        step: steps done.
        unique: tells apart the checkpoints of one step, so that a late writer of a dead start cannot spoil a new one.
    """
    return run_dir / "checkpoints" / ".".join(filter(None, (f"step-{step}", unique, "tmp")))


def part_name(block: int) -> str:
    """File name of a block's part."""
    return f"block-{block:03d}.pt"


def state_of(unit: Unit, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights, heads and optimizer state of one block; the tensors are those in use, not copies."""
    return {
        "block": unit.block.state_dict(),
        "heads": unit.heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }


def write_part(path: Path, state: dict[str, Any]) -> dict[str, str | int]:
    """Write the state of one block; it is on disk when this returns.

    Returns:
        ``{"name", "bytes", "sha256"}`` for the manifest.

    Raises:
        OSError: the file cannot be written; the message has the path and the space that is left.
    """
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(state, cast("BinaryIO", hashing))
            except RuntimeError:
                if hashing.error is not None:  # torch reports a failed write as a position that does not fit
                    raise hashing.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({_free(path.parent)} MB free)", str(path)) from None
    return {"name": path.name, "bytes": hashing.size, "sha256": hashing.digest.hexdigest()}


class _Hashing(io.RawIOBase):
    """A file that hashes what is written, so that nothing is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written


def commit(folder: Path, manifest: dict[str, Any], keep: int) -> Path:
    """Make the parts in ``folder`` a checkpoint: manifest, rename, ``best``, ``latest``, then drop old ones.

    Args:
        folder: what `folder_for` returned.
        manifest: plain values; "step", "best" and "due" (written because it was time, not for the best epoch only).
        keep: number of newest due checkpoints that stay; the best one stays too.

    Returns:
        The final folder.
    """
    parent = folder.parent
    final = parent / f"step-{manifest['step']}"
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    old = parent / f"{final.name}.old.tmp"
    if final.exists():  # the same step again: the older one goes only after the newer one is there
        os.rename(final, old)
    os.rename(folder, final)
    sync_folder(parent)
    shutil.rmtree(old, ignore_errors=True)
    if manifest.get("best"):
        write_text(parent / "best", final.name + "\n")
    write_text(parent / "latest", final.name + "\n")
    found = steps(parent.parent)
    due = [path for path in found if _is_due(path)]
    kept = {final, *due[-keep:], *named(parent.parent, "best")}
    for old in found:
        if old not in kept:
            shutil.rmtree(old)
    return final


def _is_due(checkpoint: Path) -> bool:
    try:
        return bool(manifest_of(checkpoint).get("due", True))
    except CheckpointError:
        return False  # damaged: it must not push a good one out


def named(run_dir: Path, name: str) -> list[Path]:
    """The checkpoint that ``best`` or ``latest`` names: one path, or none if there is no such file."""
    try:
        return [
            run_dir / "checkpoints" / (run_dir / "checkpoints" / name).read_text(encoding="utf-8").strip()
        ]
    except (OSError, UnicodeDecodeError):
        return []


def steps(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    found = [
        path
        for path in (run_dir / "checkpoints").glob("step-*")
        if _STEP.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def clear(run_dir: Path, chosen: Path | None) -> None:
    """Before a run goes on: remove half-written checkpoints, put those after the chosen one aside.

    They are damaged, or belong to steps that are trained again; left in place they would push out good ones.
    """
    for leftover in (run_dir / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for later in steps(run_dir) if chosen is not None else []:
        if chosen is not None and _step_of(later) > _step_of(chosen):
            aside = later.with_name(f"{later.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(later, aside)


def find(run_dir: Path, name: str | None = None) -> Path:
    """A checkpoint of a run.

    Args:
        run_dir: run folder.
        name: such as "step-40", "best" or "latest"; None takes the newest.

    Raises:
        CheckpointError: there is none.
    """
    if name in ("best", "latest"):
        pointed = named(run_dir, name)
        if not pointed:
            raise CheckpointError(f"{run_dir} has no checkpoint that is called {name!r}")
        return pointed[0]
    if name is not None:
        return run_dir / "checkpoints" / name
    found = steps(run_dir)
    if not found:
        raise CheckpointError(f"{run_dir} has no checkpoint: was the run ended before its first one?")
    return found[-1]


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: not a manifest")
    return manifest


def read_part(checkpoint: Path, block: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """State of one block, after its size and digest were compared with the manifest.

    Raises:
        CheckpointError: the part is missing or damaged.
    """
    import torch

    name = part_name(block)
    path = checkpoint / name
    entries = {entry["name"]: entry for entry in manifest_of(checkpoint).get("files", [])}
    if name not in entries:
        raise CheckpointError(f"{checkpoint}: the manifest has no {name}: another model?")
    try:
        if path.stat().st_size != entries[name]["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes instead of {entries[name]['bytes']}")
        if _digest(path) != entries[name]["sha256"]:
            raise CheckpointError(f"{path}: damaged, its SHA-256 is not that of the manifest")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path}: not a part of a checkpoint: {error}") from None
    return state


def restore(unit: Unit, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Put a block's state back.

    Raises:
        CheckpointError: the state belongs to another model.
    """
    try:
        unit.block.load_state_dict(state["block"])
        unit.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, also after a power cut."""
    # A name of its own: in containers, writers that share the folder may also share the process id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> int:
    """Megabytes that are free on the disk of a folder."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free // 1_000_000


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
