"""What a run has achieved so far: accuracies, samples, speed, and which stage holds the others back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from scpl_dist.control.items import Checkpoint, Evaluate, Item, Split, Train
from scpl_dist.control.messages import Done
from scpl_dist.coordinator.events import Commit, Record
from scpl_dist.coordinator.item_sequence import HELD, ItemSequence
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.run import scores
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure
from scpl_dist.run.scores import Sum

Metrics = dict[str, Any]  # numbers by name; None is one that is not finite
PATIENCE = 20  # steps in a row before a slow stage is called a straggler


class Results:
    """Counts over the items that the stages finish; those that the last stage finishes are the clock of the run."""

    def __init__(
        self, sequence: ItemSequence, config: Config, classes: int, position: Mapping[str, Any] | None
    ) -> None:
        position = position or {}
        # By epoch and split: numbers by name, without the matrix, which is only in metrics.jsonl.
        self.metrics: dict[int, dict[str, Metrics]] = _earlier(position)
        self.learning_rate: float | None = None
        self.samples: int = position.get("samples", 0)
        self.steps_done: int = position.get("step", 0)
        self.earlier_seconds: float = position.get("seconds", 0.0)
        self._sequence = sequence
        self._classes = classes
        self._wanted = config.task.metrics
        self._watch = config.run.watch
        for epoch in range(sequence.position["epoch"]):
            sequence.judge(self._score(epoch))
        self._last = (config.pipeline.stages - 1, 0)
        # A tenth of a short run; a long one is steady after a while, and its speed is wanted early.
        skipped = min(50, max(1, math.ceil((sequence.steps - self.steps_done) / 10)))
        self._steady_from = self.steps_done + skipped
        self._steady_samples = 0
        self._steady_seconds = 0.0
        self._previous: float | None = None
        # Of what is in progress: sums of an evaluation, and seconds of a step, by worker.
        self._sums: dict[tuple[int, Split], dict[tuple[int, int], dict[str, Sum]]] = {}
        self._busy: dict[int, dict[tuple[int, int], float]] = {}

    def goes_on(self, before: Results, seconds: float) -> None:
        """Take over from an earlier group, which has worked for so many seconds."""
        self.earlier_seconds = before.earlier_seconds + seconds

    def finished(self, member: Member, message: Done, item: Item, now: float) -> None:
        if isinstance(item, Train):
            busy = message.stats.busy - member.busy_before
            self._busy.setdefault(item.sequence, {})[member.place] = busy
            self.learning_rate = item.schedule["lr"]
        elif isinstance(item, Evaluate) and message.metrics:
            workers = self._sums.setdefault((item.epoch, item.split), {})
            workers[member.place] = scores.add([workers.get(member.place, {}), message.metrics])
        if member.place != self._last:
            return
        # The time since the previous item of any kind, so evaluations and checkpoints are left out.
        if isinstance(item, Train) and item.step >= self._steady_from and self._previous is not None:
            self._steady_samples += item.samples
            self._steady_seconds += now - self._previous
        self._previous = now

    def completed(self, item: Train) -> None:
        """All workers have trained it: the last stage may be heard before others, even about what comes after a cut."""
        self.samples += item.samples
        self.steps_done += 1

    def losses(self, member: Member, message: Done, item: Train) -> Iterator[Record | Failure]:
        """The rows of a worker's losses in one step, or the failure if one of them is not finite."""
        member.losses.clear()  # of blocks that are frozen from now on
        for block, terms in message.losses.items():
            loss = sum(terms.values())
            if not math.isfinite(loss):
                yield blame(member, Cause.NONFINITE, f"the loss of block {block} is {loss} ({terms})")
                return
            member.losses[block] = loss
            row = {"event": "train", "step": item.step, "epoch": item.epoch, "stage": member.stage}
            row |= {"block": int(block) if block.isdecimal() else block, "loss": loss, "terms": terms}
            if member.first:  # replicas have the same losses
                yield Record(row | {"lr": item.schedule["lr"]})

    def evaluated(self, epoch: int, split: Split) -> Iterator[Record]:
        """The row of a finished evaluation; the last stage that knows the answers counts."""
        workers = self._sums.pop((epoch, split), {})
        if workers:
            last = max(stage for stage, _ in workers)
            sums = scores.add(found for (stage, _), found in sorted(workers.items()) if stage == last)
            metrics = scores.values(sums, self._classes, self._wanted)
            numbers = {name: value for name, value in metrics.items() if name != scores.CONFUSION}
            self.metrics.setdefault(epoch, {})[split] = numbers
            correct, total = sums["accuracy"]
            row = {"event": "eval", "epoch": epoch, "split": split} | metrics
            yield Record(row | {"correct": correct, "total": total})
        if split == self.selected_by:
            self._sequence.judge(self._score(epoch))

    def _score(self, epoch: int) -> float:
        """What epochs are compared by, the higher the better."""
        value: float | None = self.metrics.get(epoch, {}).get(self.selected_by, {}).get(self._watch)
        if value is None:
            return -math.inf
        return -value if self._watch in scores.FALLING else value

    def commit(self, item: Checkpoint, seconds: float) -> Commit:
        """What to publish of a checkpoint that all stages have reached; `seconds` as for `result`."""
        position = item.position | {
            "accuracies": self.history(),
            "metrics": [{"epoch": epoch, **splits} for epoch, splits in sorted(self.metrics.items())],
            "samples": self.samples,
            "seconds": self.earlier_seconds + seconds,
        }
        best = self.best_epoch
        is_best = best is not None and item.step == (best + 1) * self._sequence.steps_per_epoch
        return Commit(item.step, item.epoch, position, best=is_best, unique=item.unique, due=item.due)

    def stragglers(self, sequence: int, members: Iterable[Member]) -> Iterator[tuple[Member, str]]:
        """Workers that have just become stragglers, and a warning about each."""
        busy = self._busy.pop(sequence)
        median = statistics.median_low(busy.values())  # so that of two stages one can be the straggler
        for member in members:
            seconds = busy[member.place]
            member.slow_in_a_row = member.slow_in_a_row + 1 if seconds > 2 * median else 0
            if member.slow_in_a_row == PATIENCE and not member.stragglings:
                member.stragglings += 1
                yield (
                    member,
                    f"{member.name} on {member.hello.host} holds the others back: it works for {seconds:.3g} s "
                    f'a step, the median worker for {median:.3g} s; try pipeline.partition = "measured"',
                )

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the best ``run.watch``; None before one is evaluated."""
        name = self.selected_by
        found = {epoch: self._score(epoch) for epoch, splits in self.metrics.items() if name in splits}
        return max(found, key=lambda epoch: (found[epoch], -epoch)) if found else None

    @property
    def selected_by(self) -> str:
        """The split that epochs are compared by."""
        return next(iter(self._sequence.splits), "test")

    @property
    def latest(self) -> dict[str, Metrics]:
        """Of each split the latest metrics: a series must not vanish while the next epoch is half evaluated."""
        epochs = sorted(self.metrics.items())
        return {split: found for _, splits in epochs for split, found in splits.items()}

    @property
    def samples_per_second(self) -> float | None:
        """Training samples per second without the first tenth of the steps, evaluations and checkpoints."""
        return self._steady_samples / self._steady_seconds if self._steady_seconds > 0 else None

    def line(self, epoch: int, epochs: int) -> str:
        found = self.metrics.get(epoch, {})
        parts = [f"{name} accuracy {metrics['accuracy']:.4f}" for name, metrics in found.items()]
        known = ((name, metrics.get(scores.PERPLEXITY)) for name, metrics in found.items())
        parts += [f"{name} perplexity {value:.2f}" for name, value in known if value is not None]
        if self.samples_per_second is not None:
            parts.append(f"{self.samples_per_second:.0f} samples/s")
        return f"epoch {epoch + 1}/{epochs}: " + ", ".join(parts)

    def _accuracy(self, epoch: int) -> float | None:
        found: float | None = self.metrics.get(epoch, {}).get("test", {}).get("accuracy")
        return found

    def history(self) -> list[dict[str, Any]]:
        """The accuracies of all epochs."""
        return [
            {"epoch": epoch, **{split: metrics["accuracy"] for split, metrics in splits.items()}}
            for epoch, splits in sorted(self.metrics.items())
        ]

    def result(self, config: Config, members: Iterable[Member], seconds: float) -> dict[str, Any]:
        """The numbers of ``result.json``; `seconds` is the wall time of this generation."""
        best = self.best_epoch
        last = max(self.metrics, default=-1)
        wall = self.earlier_seconds + seconds
        return {
            "method": config.run.method,
            "stages": config.pipeline.stages,
            "steps": self.steps_done,
            "epochs": self._sequence.position["epoch"],
            "stopped_early": self._sequence.stopped_early,
            "accuracy_last": self._accuracy(last),
            "accuracy_best": None if best is None else self._accuracy(best),
            "best_epoch": best,
            "selected_by": self.selected_by,
            "watch": self._watch,
            "accuracies": self.history(),
            "metrics": self.latest,
            "wall_seconds": wall,
            "samples": self.samples,
            "samples_per_second": self.samples_per_second or (self.samples / wall if wall > 0 else None),
            "per_stage": [_of_worker(member) for member in members],
        }


def _earlier(position: Mapping[str, Any]) -> dict[int, dict[str, Metrics]]:
    """The metrics of epochs that were done before a position."""
    rows = position.get("metrics")
    if rows is None:  # of a version that had accuracies only
        rows = [
            {key: value if key == "epoch" else {"accuracy": value} for key, value in row.items()}
            for row in position.get("accuracies", [])
        ]
    done = (row for row in rows if row["epoch"] < position["epoch"])
    return {row["epoch"]: {split: row[split] for split in HELD if split in row} for row in done}


def _of_worker(member: Member) -> dict[str, Any]:
    stats = member.stats
    return {
        "stage": member.stage,
        "replica": member.placed.replica,
        "busy_seconds": stats.busy,
        "waiting_seconds": stats.waiting,
        "blocked_seconds": stats.blocked,
        "phase_seconds": stats.phases,
        "block_seconds": stats.blocks,
        "bytes_sent": stats.bytes_sent,
        "bytes_to": stats.bytes_to,
        "bytes_received": stats.bytes_received,
        "peak_memory_bytes": stats.peak_memory,
    }
