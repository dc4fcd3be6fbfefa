"""The items of a run that has all its workers: which are sent, which are finished, and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scpl_dist.control.items import Checkpoint, Evaluate, Item, Train
from scpl_dist.control.messages import Done, Work
from scpl_dist.coordinator.events import Command, Record, Say, Send, warning
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.coordinator.pending_checkpoints import PendingCheckpoints
from scpl_dist.coordinator.results import Results
from scpl_dist.coordinator.window import Window
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure


class ItemFlow:
    """Follows the items through the stages; the arguments are those of `Coordinator`, and all members by rank.

    Raises:
        ValueError: the data set or the position does not fit the configuration.
    """

    def __init__(
        self,
        config: Config,
        generation: str,
        members: Mapping[int, Member],
        sizes: Mapping[str, int],
        resume: Mapping[str, Any] | None,
        window: int,
    ) -> None:
        stages = config.pipeline.stages
        self.sequence = ItemSequence(config, sizes, resume, generation)
        self.window = Window(self.sequence, window)
        self.results = Results(self.sequence, stages, resume)
        self.checkpoints = PendingCheckpoints(self.sequence, stages)
        self.begun: float | None = None
        """Monotonic time of the first item."""
        self._config = config
        self._generation = generation
        self._members = members

    def begin(self, now: float) -> list[Command]:
        """All workers are ready."""
        self.begun = now
        row, text = self.results.opening(self._config)
        return [Record(row | {"generation": self._generation}), Say(text)]

    def seconds(self, now: float) -> float:
        """Since the first item."""
        return 0.0 if self.begun is None else now - self.begun

    def feed(self, rest: bool) -> list[Command]:
        """Keep stage 0 supplied, all its workers with the same items; `rest` gives it all that is left."""
        feeding = [member for member in self._members.values() if member.stage == 0]
        begun = min(max(member.stats.begun, member.done) for member in feeding)
        items = self.window.take(begun, rest)
        peers = tuple(member.peer for member in feeding)
        return [Send(peers, Work(items=items))] if items else []

    def done(self, member: Member, message: Done, now: float) -> tuple[list[Command], Failure | None]:
        """A worker has finished an item."""
        item = self.window.open.get(message.sequence)
        if item is None or message.sequence != member.done + 1:
            text = f"{member.name} finished item {message.sequence} after item {member.done}"
            return [], blame(member, Cause.PROTOCOL, f"{text}: a message was lost or invented")
        self.results.finished(member, message, item, now)
        if member.place == (0, 0):
            self.window.finished(now)
        member.finish(message, item, now)
        commands: list[Command] = []
        if isinstance(item, Train):
            rows, problem = self.results.losses(member, message, item)
            commands += [Record(row) for row in rows]
            if problem is not None:
                return commands, blame(member, Cause.NONFINITE, problem)
        elif isinstance(item, Checkpoint) and member.first:
            self.checkpoints.copied(member.stage, item.sequence, now)
        for complete in self.window.complete(min(other.done for other in self._members.values())):
            commands += self._completed(complete, now)
        return commands, None

    def _completed(self, item: Item, now: float) -> list[Command]:
        """All workers have finished this item."""
        commands: list[Command] = []
        match item:
            case Train():
                for stage, text in self.results.stragglers(item.sequence, self._members.values()):
                    commands += warning(text, stage)
            case Evaluate(last=True):
                row = self.results.evaluated(item.epoch, item.split)
                if row is not None:
                    commands.append(Record(row))
                if item.split == self.sequence.splits[-1]:
                    commands.append(Say(self.results.line(item.epoch, self._config.run.epochs)))
            case Checkpoint():
                self.checkpoints.complete(item.sequence, self.results.commit(item, self.seconds(now)))
                commands += self.checkpoints.take(now)
        return commands

    def validate(self) -> None:
        """Check the invariants."""
        finished = [member.done for member in self._members.values()]
        self.window.validate(min(finished), max(finished))
        self.checkpoints.validate()
        assert self.results.steps_done <= self.sequence.position["step"]
