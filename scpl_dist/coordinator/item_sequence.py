"""The items of a run, in the order in which every stage handles them.

The sequence is a function of the configuration, the sizes of the data and a position, so a run that is resumed at a
checkpoint handles exactly the items that an undisturbed one handles after it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from scpl_dist.control.items import Checkpoint, EpochEnd, Evaluate, Item, Range, Split, Stop, Train
from scpl_dist.coordinator.learning_rate import LearningRate
from scpl_dist.run.config import Config

HELD: tuple[Split, ...] = ("validation", "test")


def split(begin: int, end: int, parts: int) -> tuple[Range, ...]:
    """Cut ``[begin, end)`` into at most `parts` ranges whose lengths differ by at most one, none empty."""
    parts = min(parts, end - begin)
    cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    return tuple(itertools.pairwise(cuts))


class ItemSequence:
    """Hands out the items of a run one by one.

    `sizes` are the samples in "train", "validation" and "test"; a split without samples is not evaluated. A `position`
    is ``{"epoch", "step", "batch"}``, `batch` being the next one of the epoch. No other `generation` uses the same
    folders for its checkpoints. ValueError: too few samples, a schedule that does not fit, or a position that lies
    outside the run.

    With ``run.patience`` it must hear how good each epoch is, in order (`judge`). Where the run may be over after an
    epoch, the next one is held back until that is known; so no item depends on when somebody was heard.
    """

    def __init__(
        self,
        config: Config,
        sizes: Mapping[str, int],
        position: Mapping[str, Any] | None = None,
        generation: str = "",
    ) -> None:
        if sizes.get("train", 0) < 1:
            raise ValueError(f"data.name = {config.data.name!r} has no training samples: check data.root")
        self._config = config
        self._sizes = sizes
        self._generation = generation
        self._least = max(config.layout.replicas)  # samples that every micro-batch needs, one for each worker
        full, rest = divmod(sizes["train"], config.data.batch_size)
        self._short = (
            0 if config.data.drop_last else rest
        )  # samples in the last batch of an epoch, if it is smaller
        self.steps_per_epoch = full + (self._short > 0)
        if not self.steps_per_epoch:
            raise ValueError(
                f"data.drop_last = true: data.batch_size = {config.data.batch_size} is more than the {sizes['train']} "
                "training samples, so no batch is left; use a smaller data.batch_size"
            )
        self.steps = self.steps_per_epoch * config.run.epochs
        self._rate = LearningRate(config, self.steps_per_epoch)
        self.splits = [name for name in HELD if sizes.get(name, 0) > 0]  # to be evaluated after each epoch
        self._check_replicas()
        if config.run.patience and not self.splits:
            raise ValueError(
                f"run.patience = {config.run.patience}: the data set {config.data.name!r} has no validation and no "
                "test part to tell when to stop; use run.patience = 0"
            )
        start = position or {"epoch": 0, "step": 0, "batch": 0}
        self._epoch: int = start["epoch"]
        self._step: int = start["step"]
        self._batch: int = start["batch"]
        self._check_position()
        self._saved = self._step if position else None
        self._kept = self._saved  # the same, of those that are sure to stay
        self._sequence = 0
        self._judged = 0  # epochs of which it is known how good they are
        self._best = (-math.inf, 0)  # the highest score so far, and the first epoch that had it
        self._cut = False  # a checkpoint is wanted next, and nothing after it
        self.held = False  # it has been handed out, or was there already
        self.stopping = False  # the last checkpoint of the run has been handed out, or comes next
        self._items: Iterator[Item | None] = self._run()

    def _check_replicas(self) -> None:
        size, least = self._config.data.batch_size, self._least
        last = self._short or size
        smallest = min(stop - start for start, stop in split(0, last, self._config.pipeline.micro_batches))
        problems = [f"{name} has fewer" for name in self.splits if self._sizes[name] < least]
        if smallest < least:
            problems.append(f"the last micro-batch of an epoch has {smallest} sample(s)")
        if problems:
            raise ValueError(
                f"pipeline.replicas = {self._config.pipeline.replicas}: replicas share each micro-batch, and "
                f"{problems[0]}; use fewer replicas, or a data.batch_size that leaves {least} samples or more "
                f"(now {size})"
            )

    def _check_position(self) -> None:
        epochs = self._config.run.epochs
        inside = 0 <= self._batch <= self.steps_per_epoch and 0 <= self._epoch <= epochs
        if not inside or self._step != self._epoch * self.steps_per_epoch + self._batch:
            raise ValueError(
                f"the checkpoint's position (epoch {self._epoch}, step {self._step}, batch {self._batch}) does not "
                f"fit {epochs} epochs of {self.steps_per_epoch} steps: resume with the data set and the "
                "run.epochs, data.batch_size and data.drop_last that the checkpoint was written with"
            )

    @property
    def position(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step, "batch": self._batch}

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to be trained."""
        return self._epoch >= self._config.run.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the last ``run.patience`` epochs have not been better than the best one before them."""
        return self._last_chance and self._judged == self._epoch < self._config.run.epochs

    @property
    def _last_chance(self) -> bool:
        """Whether the run is over before the next epoch unless one that is not judged yet is the best."""
        patience = self._config.run.patience
        return 0 < patience <= self._epoch - 1 - self._best[1]

    def judge(self, score: float) -> None:
        """How good the next epoch was, counted from 0: the higher the better."""
        self._best = max(self._best, (score, self._judged), key=lambda found: found[0])
        self._judged += 1

    def next(self) -> Item | None:
        """The next item; None after the stop item, and as long as the next epoch is held back."""
        item = next(self._items, None)
        self._sequence += item is not None
        return item

    def stop(self) -> None:
        """Let a checkpoint and the stop item follow next."""
        if not self.stopping:
            self.stopping = True
            self._items = self._end()

    def cut(self) -> None:
        """Let a checkpoint follow as soon as there can be one, and then nothing: the sequence is over."""
        self._cut = True

    def forget(self, step: int) -> None:
        """The checkpoint of this step was not kept."""
        if self._saved == step:
            self._saved = None

    def _run(self) -> Iterator[Item | None]:
        may_be_best = self._config.checkpoint.best
        while not self.finished:
            while self._batch < self.steps_per_epoch:
                if self._cut:
                    yield from self._hold()
                yield self._train()
                if self._batch < self.steps_per_epoch and self._due():
                    yield self._checkpoint(due=True)
            yield from self._close_epoch()
            while not self.finished and self._last_chance and self._judged < self._epoch:
                yield None
            if not self.finished and (self._due() or may_be_best):
                yield self._checkpoint(due=self._due())
        yield from self._end()

    def _hold(self) -> Iterator[Item | None]:
        if self._kept != self._step:
            yield self._checkpoint(due=True)
        self.held = True
        while True:
            yield None

    def _end(self) -> Iterator[Item]:
        if self._saved != self._step:  # the same step has the same weights: never written twice
            yield self._checkpoint(due=True)
        self.stopping = True
        yield Stop(sequence=self._sequence)

    def _due(self) -> bool:
        every = self._config.checkpoint.every_steps
        return every > 0 and self._step % every == 0

    def _train(self) -> Train:
        begin = self._batch * self._config.data.batch_size
        end = min(begin + self._config.data.batch_size, self._sizes["train"])
        share, update = self._group()
        item = Train(
            sequence=self._sequence,
            step=self._step,
            epoch=self._epoch,
            schedule={"lr": self._rate(self._step)},
            micro_batches=split(begin, end, self._config.pipeline.micro_batches),
            share=share,
            update=update,
        )
        self._batch += 1
        self._step += 1
        return item

    def _group(self) -> tuple[float, bool]:
        """Share of the next batch in its update, and whether it is the last one of that; updates end with the epoch."""
        size = self._config.optimizer.accumulate
        begin = self._batch - self._batch % size
        end = min(begin + size, self.steps_per_epoch)
        return 1 / (end - begin), self._batch == end - 1

    def _close_epoch(self) -> Iterator[Item]:
        size = self._config.data.batch_size
        items: list[Item] = [EpochEnd(sequence=self._sequence, epoch=self._epoch)]
        for name in self.splits:
            total = self._sizes[name]
            cuts = [0, *range(size, total - self._least + 1, size), total]
            items += [
                Evaluate(
                    sequence=self._sequence + number,
                    epoch=self._epoch,
                    split=name,
                    micro_batches=(batch,),
                    last=batch[1] == total,
                )
                for number, batch in enumerate(itertools.pairwise(cuts), len(items))
            ]
        yield from items[:-1]
        self._epoch += 1  # before the last item is handed out: a stop after it goes on with the next epoch
        self._batch = 0
        yield items[-1]

    def _checkpoint(self, due: bool) -> Checkpoint:
        self._saved = self._step
        if due:
            self._kept = self._step
        return Checkpoint(
            sequence=self._sequence,
            step=self._step,
            epoch=self._epoch,
            position=self.position,
            due=due,
            unique=f"{self._generation}-{self._sequence}",
        )
