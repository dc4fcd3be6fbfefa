"""Checkpoints on their way to the disk.

A checkpoint marker runs through the stages like a micro-batch, and each copies its state when the marker reaches it:
together a consistent cut through the pipeline. The parts are written beside the training, so they arrive later and
in any order. What belongs to the position of the cut is taken when the last stage has copied its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scpl_dist.control.messages import Done, Written
from scpl_dist.coordinator.events import Commit, Discard
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Failure

SLOW = "the disk of the run folder is slow or does not answer; if it is only slow, raise runtime.timeout_s"


@dataclass(slots=True)
class _Cut:
    """One checkpoint whose parts are not all there."""

    files: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Files by stage."""
    begun: dict[int, float] = field(default_factory=dict)
    """When a stage had copied its state."""
    seconds: float = 0.0
    ready: Commit | None = None
    """What to publish when all parts are there; known when the marker has left the pipeline."""


class PendingCheckpoints:
    """The checkpoints of one generation that are not published yet.

    Args:
        stages: number of stages.
    """

    def __init__(self, stages: int) -> None:
        self.agenda: ItemSequence | None = None
        """Told which checkpoints did not stay."""
        self._stages = stages
        self._cuts: dict[int, _Cut] = {}
        self._writers: set[int] = set()
        """Stages that have written a part before, so that the shorter limit holds for them."""
        self._publishing: dict[int, float] = {}
        """Steps that are being published, and since when."""

    @property
    def pending(self) -> bool:
        """Whether something is not on disk yet."""
        return bool(self._cuts or self._publishing)

    def copied(self, message: Done, now: float) -> None:
        """A stage has copied its state."""
        self._cuts.setdefault(message.sequence, _Cut()).begun[message.stage] = now

    def written(self, message: Written) -> bool:
        """A stage's part is on disk; False if no such part is awaited."""
        cut = self._cuts.get(message.sequence)
        if cut is None or message.stage not in cut.begun or message.stage in cut.files:
            return False
        cut.files[message.stage] = [file.model_dump() | {"stage": message.stage} for file in message.files]
        cut.seconds = max(cut.seconds, message.seconds)
        self._writers.add(message.stage)
        return True

    def complete(self, sequence: int, commit: Commit) -> None:
        """All stages have copied their state, so this describes the cut."""
        self._cuts[sequence].ready = commit

    def take(self, now: float) -> list[Commit | Discard]:
        """What can be done now, oldest first: checkpoints are published in order.

        One that is neither due nor the best does not stay, except for the newest one of a run that is ending.
        """
        assert self.agenda is not None
        found: list[Commit | Discard] = []
        for sequence, cut in sorted(self._cuts.items()):
            commit = cut.ready
            if commit is None or len(cut.files) < self._stages:
                break
            del self._cuts[sequence]
            if not (commit.due or commit.best or (self.agenda.stopping and not self._cuts)):
                self.agenda.forget(commit.step)
                found.append(Discard(commit.step, commit.unique))
                continue
            parts = [file for files in cut.files.values() for file in files]
            parts.sort(key=lambda file: (file["stage"], file["name"]))
            self._publishing[commit.step] = now
            found.append(replace(commit, files=parts, seconds=cut.seconds))
        return found

    def published(self, step: int) -> None:
        """The service has published a checkpoint, or failed to."""
        self._publishing.pop(step, None)

    def late(self, members: Mapping[int, Member], config: Config, now: float) -> Failure | None:
        """The failure of a disk that takes too long."""
        for step, since in self._publishing.items():
            if now - since >= config.runtime.timeout_s:
                text = f"publishing the checkpoint of step {step} has taken {now - since:.1f} s"
                return Failure("hang", text, SLOW, step=step, phase="checkpoint")
        for cut in self._cuts.values():
            for stage, since in cut.begun.items():
                limit = config.runtime.timeout_s
                if stage not in self._writers:
                    limit = max(limit, config.runtime.first_step_timeout_s)
                if stage not in cut.files and now - since >= limit:
                    text = f"stage {stage} has been writing its part of a checkpoint for {now - since:.1f} s"
                    return blame(members[stage], "hang", text, SLOW)
        return None
