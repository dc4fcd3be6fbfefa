"""The part of a checkpoint that belongs to one block: written with its digest, and read only if that is right."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from scpl_dist.storage.checkpoints import CheckpointError, compare, manifest_of


def part_name(block: int) -> str:
    return f"block-{block:03d}.pt"


def write_part(path: Path, state: dict[str, Any]) -> dict[str, str | int]:
    """Write the state of one block durably; gives ``{"name", "bytes", "sha256"}`` for the manifest."""
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
            size = file.tell()
    except OSError as error:
        there = next(folder for folder in path.parents if folder.is_dir())
        free = shutil.disk_usage(there).free // 1_000_000
        with contextlib.suppress(OSError):
            path.unlink()  # the run has more to write, such as how it ended
        raise OSError(error.errno, f"{error.strerror} ({free} MB free)", str(path)) from None
    return {"name": path.name, "bytes": size, "sha256": hashing.digest.hexdigest()}


class _Hashing(io.RawIOBase):
    """A file that hashes what is written, so that nothing is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def read_part(
    checkpoint: Path, block: int, device: torch.device | str = "cpu", verified: bool = False
) -> dict[str, Any]:
    """State of one block, after its size and digest were compared with the manifest.

    Only the size if it is `verified`: all files have been hashed before the coordinator was told of the checkpoint,
    and nobody changes a committed one; see `scpl_dist.storage.resume`.
    """
    path = checkpoint / part_name(block)
    entries = {entry["name"]: entry for entry in manifest_of(checkpoint)["files"]}
    if path.name not in entries:
        raise CheckpointError(f"{checkpoint}: the manifest has no {path.name}: another model?")
    compare(path, entries[path.name], hashing=not verified)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path}: not a part of a checkpoint: {error}") from None
    return state
