"""Checkpoints: one file for each block, and a manifest that makes them one checkpoint.

    RUN/checkpoints/step-40.tmp/block-000.pt ...   written by the stages when the marker reaches them
    RUN/checkpoints/step-40/manifest.json          written by the coordinator when all parts are there; then renamed
    RUN/checkpoints/latest                         text file with the name of the newest one, moved last

Files belong to blocks, not to stages, so a run can go on with another number of stages. Parts are loaded with
``weights_only=True``; nothing in them can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from scpl_dist.methods.unit import Unit

__all__ = [
    "CheckpointError",
    "commit",
    "find",
    "folder_for",
    "manifest_of",
    "read_part",
    "restore",
    "write_part",
]


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the file and the reason."""


def folder_for(run_dir: Path, step: int) -> Path:
    """Folder that the parts of a checkpoint are written into before it is committed."""
    return run_dir / "checkpoints" / f"step-{step}.tmp"


def part_name(block: int) -> str:
    """File name of a block's part."""
    return f"block-{block:03d}.pt"


def write_part(
    folder: Path, block: int, unit: Unit, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, str | int]:
    """Write weights, heads and optimizer state of one block; on disk when it returns.

    Returns:
        ``{"name", "bytes", "sha256"}`` for the manifest.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / part_name(block)
    state = {
        "block": unit.block.state_dict(),
        "heads": unit.heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}


def commit(folder: Path, manifest: dict[str, Any], keep: int) -> Path:
    """Make the parts in ``folder`` a checkpoint: manifest, rename, ``latest``, then drop old ones.

    Args:
        folder: what `folder_for` returned.
        manifest: plain values, see `manifest_of`.
        keep: number of newest checkpoints that stay.

    Returns:
        The final folder.
    """
    final = folder.with_suffix("")
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    if final.exists():  # the same step again, after a resume: the newer one is as good and complete
        shutil.rmtree(final)
    os.rename(folder, final)
    sync_folder(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    for old in steps(final.parent.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def steps(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    found = [
        path for path in (run_dir / "checkpoints").glob("step-*") if path.suffix != ".tmp" and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
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
        raise CheckpointError(f"{path}: {error}") from None
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
        raise CheckpointError(f"{path}: {error}") from None
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
    temporary = path.with_name(path.name + ".tmp")
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
