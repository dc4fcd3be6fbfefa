"""Checkpoints on their way to the disk.

A checkpoint marker runs through the stages like a micro-batch, and each copies its state when the marker reaches it:
together a consistent cut through the pipeline. The parts are written beside the training, so they arrive later and
in any order. What belongs to the position of the cut is taken when the last stage has copied its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scpl_dist.control.messages import Written
from scpl_dist.coordinator.events import Commit, Discard
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure
from scpl_dist.run.phases import Phase

SLOW = "the disk of the run folder is slow or does not answer; if it is only slow, raise runtime.timeout_s"


@dataclass(slots=True)
class _Parts:
    """A checkpoint whose parts are not all there, by stage."""

    copied: dict[int, float] = field(default_factory=dict)  # when its state was copied
    files: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # what it has written
    seconds: float = 0.0  # the longest time that one has written
    ready: Commit | None = None  # what to publish; known when the marker has left the pipeline


class PendingCheckpoints:
    """The checkpoints of one generation that are not published yet; the sequence hears which ones did not stay."""

    def __init__(self, sequence: ItemSequence, stages: int) -> None:
        self._sequence = sequence
        self._stages = stages
        self._parts: dict[int, _Parts] = {}  # by sequence number of the item
        self._writers: set[int] = set()  # stages that have written a part: the shorter limit holds for them
        self._publishing: dict[int, float] = {}  # steps that are being published, and since when

    @property
    def pending(self) -> bool:
        return bool(self._parts or self._publishing)

    def copied(self, stage: int, sequence: int, now: float) -> None:
        self._parts.setdefault(sequence, _Parts()).copied[stage] = now

    def written(self, stage: int, message: Written, begun: bool) -> bool:
        """A stage's part is on disk; False if no such part is awaited. `begun`: the marker is on its way."""
        if begun:
            self._parts.setdefault(message.sequence, _Parts())
        parts = self._parts.get(message.sequence)
        if parts is None or stage in parts.files:
            return False
        parts.files[stage] = [asdict(file) | {"stage": stage} for file in message.files]
        parts.seconds = max(parts.seconds, message.seconds)
        self._writers.add(stage)
        return True

    def complete(self, sequence: int, commit: Commit) -> None:
        """All stages have copied their state, and this describes the cut."""
        self._parts[sequence].ready = commit

    def take(self, now: float) -> list[Commit | Discard]:
        """What can be done now, oldest first: checkpoints are published in order.

        One that is neither due nor the best does not stay, except for the newest one of a run that is ending.
        """
        found: list[Commit | Discard] = []
        for sequence, parts in sorted(self._parts.items()):
            commit = parts.ready
            if commit is None or len(parts.files) < self._stages:
                break
            del self._parts[sequence]
            if commit.due or commit.best or (self._sequence.stopping and not self._parts):
                files = [file for files in parts.files.values() for file in files]
                files.sort(key=lambda file: (file["stage"], file["name"]))
                self._publishing[commit.step] = now
                found.append(replace(commit, files=files, seconds=parts.seconds))
            else:
                self._sequence.forget(commit.step)
                found.append(Discard(commit.step, commit.unique))
        return found

    def published(self, step: int) -> None:
        self._publishing.pop(step, None)

    def unpublished(self, config: Config, now: float) -> Failure | None:
        """The failure of a checkpoint whose parts are all there, and that takes too long to become visible."""
        for step, since in self._publishing.items():
            if now - since >= config.runtime.timeout_s:
                text = f"publishing the checkpoint of step {step} has taken {now - since:.1f} s"
                return Failure(Cause.HANG, text, SLOW, step=step, phase=Phase.CHECKPOINT)
        return None

    def late(self, members: Mapping[int, Member], config: Config, now: float) -> Failure | None:
        """The failure of a stage that does not get its part of a checkpoint onto the disk."""
        runtime = config.runtime
        for parts in self._parts.values():
            for stage in parts.copied.keys() - parts.files.keys():
                seconds = now - parts.copied[stage]
                first = 0.0 if stage in self._writers else runtime.first_step_timeout_s
                if seconds >= max(runtime.timeout_s, first):
                    text = f"stage {stage} has been writing its part of a checkpoint for {seconds:.1f} s"
                    return blame(members[stage], Cause.HANG, text, SLOW)
        return None
