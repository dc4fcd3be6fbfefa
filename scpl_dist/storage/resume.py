"""Which checkpoint a run goes on from: the newest one that is whole and belongs to its model.

A checkpoint whose bytes are not those of its manifest would load without an error and train on garbage, so every
file is compared first. A damaged one is named and passed over; if none is left the run ends, because a silent
fresh start would look like a resumed one.

Whoever starts the coordinator compares, once in a start, for all workers, and before anything in the run's folder
changes: it alone can still take the checkpoint before. The workers compare sizes a moment later, as a committed
checkpoint is never changed, but a file system may be behind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scpl_dist.run.config import Config, Effect, effects
from scpl_dist.storage.checkpoints import CheckpointError, manifest_of, named, steps, verify


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Beginning(NamedTuple):
    """Where a start begins; checkpoint and manifest are empty at the beginning of a run."""

    restore: str  # path of the checkpoint
    manifest: dict[str, Any]  # its
    seen: list[Path]  # all checkpoints of the run folder when it was chosen


def begin(run_dir: Path | None, resume: str, config: Config) -> Beginning:
    """Where a start begins, decided before anything in its folder changes.

    As `choose`, and says on standard error what the user should know.
    """
    seen = [] if run_dir is None else steps(run_dir)
    chosen = choose(run_dir, resume, _warn, config)
    if chosen is not None:
        return Beginning(str(chosen[0].resolve()), chosen[1], seen)
    if resume == "auto":
        print(f"nothing to resume in {run_dir}: the run starts at its beginning", file=sys.stderr, flush=True)
    return Beginning("", {}, seen)


def choose(
    run_dir: Path | None, resume: str, warn: Callable[[str], None], config: Config
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its manifest.

    `resume` is "never", "auto" (the newest whole one of `run_dir`, none if there has never been one) or the folder of a
    checkpoint or a run. `warn` hears of each damaged one; one of another model is as good as damaged. `CheckpointError`
    if there are checkpoints, but none is whole, or if the folder is none.
    """
    if resume == "never" or (resume == "auto" and run_dir is None):
        return None
    asked = run_dir if resume == "auto" and run_dir is not None else Path(resume)
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


def _usable(config: Config, checkpoint: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The manifest of a whole checkpoint of this run's model; other differences are warned of."""
    manifest = manifest_of(checkpoint)
    # Earlier versions had one optimizer and froze nothing, and did not say so.
    there, here = {"optimizer.name": "adam", "block": []} | manifest.get("recipe", {}), config.recipe()
    changed = {
        key: f"{key} = {there[key]!r}, now {here[key]!r}"
        for key in sorted(here)
        if key in there and there[key] != here[key]
    }
    foreign = [text for key, text in changed.items() if effects()[key] is Effect.MODEL]
    if foreign:
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: of another model: {', '.join(foreign)}")
    verify(checkpoint)
    if changed:
        warn(
            f"checkpoint {checkpoint.name} was written with other settings: {', '.join(changed.values())}; "
            "the result will not be that of an undisturbed run"
        )
    if "run.epochs" in changed:
        warn(
            f"the schedule is that of {config.run.epochs} epochs from the beginning, of which "
            f"{manifest['position']['epoch']} are done: the learning rate may jump; for a schedule of its own, start a "
            "new run with model.weights"
        )
    return manifest
