"""Which checkpoint a run goes on from: the newest one that is whole and belongs to its model.

A checkpoint whose bytes are not those of its manifest would load without an error and train on garbage, so every
file is compared first. A damaged one is named and passed over; if none is left the run ends, because a silent
fresh start would look like a resumed one.

The coordinator compares, once in a start and for all workers: it alone can still take the checkpoint before. The
workers compare sizes a moment later, as a committed checkpoint is never changed, but a file system may be behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scpl_dist.run.config import Config
from scpl_dist.storage.checkpoints import CheckpointError, manifest_of, named, steps, verify

# Keys that decide which tensors a checkpoint has and what they mean.
_MODEL = ("run.method", "model.", "loss.")


def choose(
    run_dir: Path, resume: str, warn: Callable[[str], None], config: Config
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its manifest.

    `resume` is "never", "auto" (the newest whole one, none if there has never been one) or the folder of a checkpoint
    or a run. `warn` hears of each damaged one; one of another model is as good as damaged. `CheckpointError` if there
    are checkpoints, but none is whole, or if the folder is none.
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
    """Before anything is changed in a run's folder: `CheckpointError` if it has only checkpoints of other models."""
    problems = []
    for checkpoint in steps(run_dir):
        try:
            foreign, _ = _changes(config, manifest_of(checkpoint))
        except CheckpointError:
            continue  # damaged: `choose` will say so
        if not foreign:
            return
        problems.append(f"{checkpoint.name}: of another model: {foreign}")
    if problems:
        raise CheckpointError(f"no usable checkpoint in {run_dir}: {'; '.join(problems)}")


def _changes(config: Config, manifest: dict[str, Any]) -> tuple[str, str]:
    """What the run has changed of the model, and in all."""
    there, here = manifest.get("recipe", {}), config.recipe()
    changed = [key for key in sorted(here) if key in there and there[key] != here[key]]
    texts = [f"{key} = {there[key]!r}, now {here[key]!r}" for key in changed]
    return ", ".join(text for text in texts if text.startswith(_MODEL)), ", ".join(texts)


def _usable(config: Config, checkpoint: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The manifest of a whole checkpoint of this run's model; other differences are warned of."""
    manifest = verify(checkpoint)
    foreign, changed = _changes(config, manifest)
    if foreign:
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: of another model: {foreign}")
    if changed:
        warn(
            f"checkpoint {checkpoint.name} was written with other settings: {changed}; "
            "the result will not be that of an undisturbed run"
        )
    return manifest
