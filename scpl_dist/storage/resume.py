"""Which checkpoint a run goes on from: the newest one that is whole and belongs to its model.

A checkpoint whose bytes are not those of its manifest would load without an error and train on garbage, so every
file is compared first. A damaged one is named and passed over; if none is left the run ends, because a silent
fresh start would look like a resumed one.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scpl_dist.run.config import Config
from scpl_dist.storage.checkpoints import CheckpointError, manifest_of, named, steps

MODEL = ("run.method", "model.", "loss.")
"""Keys that decide which tensors a checkpoint has and what they mean."""


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


def choose(
    run_dir: Path, resume: str, warn: Callable[[str], None], config: Config | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its manifest.

    Args:
        run_dir: the run's folder.
        resume: "never", "auto" (the newest whole one, none if there has never been one) or a folder: a checkpoint,
            or a run.
        warn: called with a text about each damaged checkpoint.
        config: the run that goes on; a checkpoint of another model is as good as a damaged one.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; or the folder is none.
    """
    if resume == "never":
        return None
    asked = run_dir if resume == "auto" else Path(resume)
    if resume != "auto" and re.fullmatch(r"step-\d+", asked.name):
        return asked, _usable(config, asked, warn)
    found = steps(asked)
    problems = []
    for pointed in named(asked, "latest"):
        if not pointed.is_dir():
            problems.append(f"{pointed}: missing, though `latest` names it")
            warn(f"checkpoint {pointed.name} is not usable, trying the one before: {problems[-1]}")
    if not found and not problems and resume == "auto":
        return None
    for checkpoint in reversed(found):
        try:
            return checkpoint, _usable(config, checkpoint, warn)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"checkpoint {checkpoint.name} is not usable, trying the one before: {error}")
    reasons = "; ".join(problems) or "there is none"
    raise CheckpointError(
        f"no usable checkpoint in {asked}: {reasons}; --resume never starts from the beginning"
    )


def require_same_model(config: Config, run_dir: Path) -> None:
    """Before anything is changed in a run's folder: are its checkpoints those of this model?

    Raises:
        CheckpointError: there are some, and none is.
    """
    problems = []
    for checkpoint in steps(run_dir):
        try:
            foreign = _foreign(config, manifest_of(checkpoint))
        except CheckpointError:
            continue  # damaged: `choose` will say so
        if not foreign:
            return
        problems.append(f"{checkpoint.name}: of another model: {foreign}")
    if problems:
        raise CheckpointError(f"no usable checkpoint in {run_dir}: {'; '.join(problems)}")


def _foreign(config: Config, manifest: dict[str, Any]) -> str:
    return ", ".join(text for key, text in _changes(config, manifest).items() if key.startswith(MODEL))


def _changes(config: Config, manifest: dict[str, Any]) -> dict[str, str]:
    there, here = manifest.get("recipe", {}), config.recipe()
    changed = [key for key in sorted(here) if key in there and there[key] != here[key]]
    return {key: f"{key} = {there[key]!r}, now {here[key]!r}" for key in changed}


def _usable(config: Config | None, checkpoint: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The manifest of a whole checkpoint of this run's model; other differences are warned of."""
    manifest = verify(checkpoint)
    if config is None:
        return manifest
    foreign = _foreign(config, manifest)
    if foreign:
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: of another model: {foreign}")
    changed = _changes(config, manifest)
    if changed:
        warn(
            f"checkpoint {checkpoint.name} was written with other settings: {', '.join(changed.values())}; "
            "the result will not be that of an undisturbed run"
        )
    return manifest


def table(run_dir: Path) -> str:
    """The checkpoints of a run as text: what their manifests say, without reading the parts.

    Raises:
        CheckpointError: there are none.
    """
    names = {path.name: name for name in ("best", "latest") for path in named(run_dir, name)}
    both = {path.name for path in named(run_dir, "best")} & {path.name for path in named(run_dir, "latest")}
    rows = [f"{'checkpoint':<14} {'epoch':>5} {'stages':>6} {'bytes':>12}  {'written':<19}  called"]
    for checkpoint in _all(run_dir):
        try:
            manifest = manifest_of(checkpoint)
            size = sum(int(entry["bytes"]) for entry in manifest["files"])
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["created"]))
            called = "best, latest" if checkpoint.name in both else names.get(checkpoint.name, "")
            text = f"{manifest['epoch']:>5} {manifest['stages']:>6} {size:>12,}  {when:<19}  {called}"
        except (CheckpointError, KeyError, TypeError) as error:
            text = f"damaged: {error}"
        rows.append(f"{checkpoint.name:<14} {text}".rstrip())
    return "\n".join(rows)


def report(run_dir: Path) -> int:
    """Print whether each checkpoint of a run is whole.

    Returns:
        Exit code: 0 if all are, 1 if one is damaged.

    Raises:
        CheckpointError: there are none.
    """
    code = 0
    for checkpoint in _all(run_dir):
        try:
            files = verify(checkpoint)["files"]
            print(f"{checkpoint.name}: ok, {len(files)} files")
        except CheckpointError as error:
            code = 1
            print(f"{checkpoint.name}: DAMAGED: {error}")
    return code


def _all(run_dir: Path) -> list[Path]:
    found = steps(run_dir)
    if not found:
        raise CheckpointError(f"{run_dir} has no checkpoints")
    return found
