"""The items of a run that has all its workers: which are sent, which are finished, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from scpl_dist.control.items import Checkpoint, Computed, Evaluate, Item, Train
from scpl_dist.control.messages import Dataset, Done, Work, Written
from scpl_dist.coordinator.event_log import Origin
from scpl_dist.coordinator.events import Command, Record, Say, Send, warning
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.coordinator.pending_checkpoints import PendingCheckpoints
from scpl_dist.coordinator.results import Results
from scpl_dist.coordinator.window import Window
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure


class ItemFlow:
    """Follows the items through the stages; ValueError if data set or position do not fit the run."""

    def __init__(
        self,
        config: Config,
        origin: Origin,
        members: Mapping[int, Member],
        data: Dataset,
        group: int = 0,
    ) -> None:
        stages = config.pipeline.stages
        unique = f"{origin.generation[:8]}-{group}" if group else origin.generation[:8]
        self.sequence = ItemSequence(config, data.sizes, origin.resume, unique)
        self.window = Window(self.sequence, origin.window, len(members))
        self.results = Results(self.sequence, config, data.classes, origin.resume)
        self.checkpoints = PendingCheckpoints(self.sequence, stages)
        self.begun: float | None = None  # monotonic time of the first item
        self._config = config
        self._data = data
        self._generation, self._group = origin.generation, group
        self._members = members
        self._feeding = [member for member in members.values() if member.stage == 0]

    def begin(self, now: float) -> list[Command]:
        self.begun = now
        run, stages = self._config.run, self._config.pipeline.stages
        steps, done = self.sequence.steps, self.results.steps_done
        row = {"event": "start", "method": run.method, "stages": stages, "workers": len(self._members)}
        data, devices = self._config.data, {member.hello.device for member in self._members.values()}
        parts = ", ".join(f"{number} {name}" for name, number in self._data.sizes.items() if number)
        text = (
            f"{run.method}: {stages} stages on {', '.join(sorted(devices))}; {run.epochs} epochs, {steps} steps of "
            f"{data.batch_size}; {data.name}: {self._data.classes} classes, samples {parts}; "
            f"augmentation {data.augmentation}"
        )
        if done:
            text += f", going on after step {done}"
        return [
            Record(
                row | {"step": done, "steps": steps, "generation": self._generation, "group": self._group}
            ),
            Say(text),
        ]

    def seconds(self, now: float) -> float:
        return 0.0 if self.begun is None else now - self.begun

    def seconds_left(self, now: float) -> float | None:
        """Of training, at the speed of this group; None before it is known."""
        done, speed = self.results.steps_done, self.results.samples_per_second
        if not speed or not done:
            return None
        return (self.sequence.steps - done) * self.results.samples / done / speed

    @property
    def resting(self) -> bool:
        """Whether everything up to a cut is done and on disk, and nothing more has been handed out."""
        return self.sequence.held and not self.window.open and not self.checkpoints.pending

    def feed(self, rest: bool) -> Iterator[Command]:
        """Keep stage 0 supplied, all its workers with the same items; `rest` gives it all that is left."""
        begun = min(max(member.stats.begun, member.done) for member in self._feeding)
        items = self.window.take(begun, rest)
        if items:
            yield Send(tuple(member.peer for member in self._feeding), Work(items=items))

    def done(self, member: Member, message: Done, now: float) -> Iterator[Command | Failure]:
        item = self.window.open.get(message.sequence)
        if item is None or message.sequence != member.done + 1:
            text = f"{member.name} finished item {message.sequence} after item {member.done}"
            yield blame(member, Cause.PROTOCOL, f"{text}: a message was lost or invented")
            return
        self.results.finished(member, message, item, now)
        if member.place == (0, 0) and isinstance(item, Computed):
            self.window.finished(now)
        member.finish(message, item, now)
        if isinstance(item, Train):
            yield from self.results.losses(member, message, item)
        elif isinstance(item, Checkpoint) and member.first:
            self.checkpoints.copied(member.stage, item.sequence, now)
        complete = self.window.complete(item.sequence)
        if complete is not None:
            yield from self._completed(complete, now)

    def written(self, member: Member, message: Written, now: float) -> Iterator[Command]:
        """A stage's part of a checkpoint is on disk: its writer may be faster than the rest of the item."""
        begun = isinstance(self.window.open.get(message.sequence), Checkpoint)
        if not self.checkpoints.written(member.stage, message, begun):
            yield from warning(
                f"{member.name} wrote a checkpoint (item {message.sequence}) that nobody waits for"
            )
        yield from self.checkpoints.take(now)

    def _completed(self, item: Item, now: float) -> Iterator[Command]:
        match item:
            case Train():
                self.results.completed(item)
                for member, text in self.results.stragglers(item.sequence, self._members.values()):
                    yield from warning(text, member.stage)
            case Evaluate(last=True):
                yield from self.results.evaluated(item.epoch, item.split)
                if item.split == self.sequence.splits[-1]:
                    yield Say(self.results.line(item.epoch, self._config.run.epochs), "epoch")
            case Checkpoint():
                self.checkpoints.complete(item.sequence, self.results.commit(item, self.seconds(now)))
                yield from self.checkpoints.take(now)
