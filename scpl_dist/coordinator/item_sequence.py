"""The items of a run, in the order in which every stage handles them.

The agenda is a function of the configuration, the sizes of the data and a position, so a run that is resumed at a
checkpoint handles exactly the items that an undisturbed one handles after it. An item is a map with "sequence"
(counted from 0 in each generation) and "kind":

    train       step, epoch, lr, micro_batches [[a, b], ...]: positions in the epoch's order
    epoch       epoch                                         the end of an epoch
    evaluate    epoch, split, micro_batches, last             positions in natural order
    checkpoint  step (steps done), epoch, position, due       a cut through the whole pipeline; due: because it is
                                                              time, and not only in case the epoch is the best
    stop
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from scpl_dist.run.config import Config


def rate(config: Config, done: int, steps: int) -> float:
    """Learning rate after `done` of `steps` steps: a cosine from ``optimizer.lr`` down to ``optimizer.end_lr``.

    It is set once an epoch, so `done` is the number of steps done at the start of the epoch.
    """
    start, end = config.optimizer.lr, config.optimizer.end_lr
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done / steps))


def split(begin: int, end: int, parts: int) -> list[list[int]]:
    """Cut ``[begin, end)`` into at most `parts` ranges whose lengths differ by at most one, none empty."""
    parts = min(parts, end - begin)
    cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    return [[a, b] for a, b in itertools.pairwise(cuts)]


class ItemSequence:
    """Hands out the items of a run one by one.

    Args:
        config: the run.
        sizes: samples in "train", "validation" and "test"; a split without samples is not evaluated.
        position: ``{"epoch", "step", "batch"}`` of a checkpoint to go on from; `batch` is the next one of the epoch.

    Raises:
        ValueError: no training samples, or a position that lies outside the run.
    """

    def __init__(
        self, config: Config, sizes: Mapping[str, int], position: Mapping[str, Any] | None = None
    ) -> None:
        if sizes.get("train", 0) < 1:
            raise ValueError(f"data.name = {config.data.name!r} has no training samples: check data.root")
        self._config = config
        self._sizes = sizes
        self._least = max(config.layout.replicas)
        """Samples that every micro-batch needs, one for each replica."""
        self.steps_per_epoch = math.ceil(sizes["train"] / config.data.batch_size)
        self.steps = self.steps_per_epoch * config.run.epochs
        self.splits = [name for name in ("validation", "test") if sizes.get(name, 0) > 0]
        """What is evaluated after each epoch, in this order."""
        self._check_replicas()
        self._epoch: int = position["epoch"] if position else 0
        self._step: int = position["step"] if position else 0
        self._batch: int = position["batch"] if position else 0
        inside = 0 <= self._batch <= self.steps_per_epoch and 0 <= self._epoch <= config.run.epochs
        if not inside or self._step != self._epoch * self.steps_per_epoch + self._batch:
            raise ValueError(
                f"the checkpoint's position (epoch {self._epoch}, step {self._step}, batch {self._batch}) does not "
                f"fit {config.run.epochs} epochs of {self.steps_per_epoch} steps: resume with the data set and the "
                "run.epochs and data.batch_size that the checkpoint was written with"
            )
        self._saved = self._step if position else None
        self._sequence = 0
        self._stopping = False
        self._items = self._run()

    def _check_replicas(self) -> None:
        size, least = self._config.data.batch_size, self._least
        last = self._sizes["train"] % size or size
        smallest = min(stop - start for start, stop in split(0, last, self._config.pipeline.micro_batches))
        few = [name for name in self.splits if self._sizes[name] < least]
        if smallest < least or few:
            what = (
                f"the last micro-batch of an epoch has {smallest} sample(s)"
                if not few
                else f"{few[0]} has fewer"
            )
            raise ValueError(
                f"pipeline.replicas = {self._config.pipeline.replicas}: replicas share each micro-batch, and {what}; "
                f"use fewer replicas, or a data.batch_size that leaves {least} samples or more (now {size})"
            )

    @property
    def position(self) -> dict[str, int]:
        """Where the agenda is, for `Agenda(position=...)`."""
        return {"epoch": self._epoch, "step": self._step, "batch": self._batch}

    def next(self) -> dict[str, Any] | None:
        """The next item, or None after the stop item."""
        item = next(self._items, None)
        if item is None:
            return None
        item["sequence"] = self._sequence
        self._sequence += 1
        return item

    def stop(self) -> None:
        """Let a checkpoint and the stop item follow next."""
        if not self._stopping:
            self._stopping = True
            self._items = self._end()

    def _run(self) -> Iterator[dict[str, Any]]:
        while self._epoch < self._config.run.epochs:
            while self._batch < self.steps_per_epoch:
                yield self._train()
                if self._batch < self.steps_per_epoch and self._due():
                    yield self._checkpoint()
            yield from self._close_epoch()
            if self._epoch < self._config.run.epochs and (self._due() or self._may_be_best):
                yield self._checkpoint(due=self._due())
        yield from self._end()

    def _end(self) -> Iterator[dict[str, Any]]:
        if self._saved != self._step:  # the same step has the same weights: never written twice
            yield self._checkpoint()
        self._stopping = True
        yield {"kind": "stop"}

    def forget(self, step: int) -> None:
        """The checkpoint of this step was not kept."""
        if self._saved == step:
            self._saved = None

    @property
    def stopping(self) -> bool:
        """Whether the last checkpoint of the run has been handed out, or asked for by `stop`."""
        return self._stopping

    @property
    def _may_be_best(self) -> bool:
        return self._config.checkpoint.best and self._config.checkpoint.every_steps > 0

    def _due(self) -> bool:
        every = self._config.checkpoint.every_steps
        return every > 0 and self._step % every == 0

    def _train(self) -> dict[str, Any]:
        size = self._config.data.batch_size
        begin = self._batch * size
        end = min(begin + size, self._sizes["train"])
        item = {
            "kind": "train",
            "step": self._step,
            "epoch": self._epoch,
            "lr": rate(self._config, self._epoch * self.steps_per_epoch, self.steps),
            "micro_batches": split(begin, end, self._config.pipeline.micro_batches),
        }
        self._batch += 1
        self._step += 1
        return item

    def _close_epoch(self) -> Iterator[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"kind": "epoch", "epoch": self._epoch}]
        size = self._config.data.batch_size
        for name in self.splits:
            total = self._sizes[name]
            ends = [*range(size, total - self._least + 1, size), total]
            for begin, end in itertools.pairwise([0, *ends]):
                items.append(
                    {
                        "kind": "evaluate",
                        "epoch": self._epoch,
                        "split": name,
                        "micro_batches": [[begin, end]],
                        "last": end == total,
                    }
                )
        yield from items[:-1]
        # Before the last item is handed out: a stop after it goes on with the next epoch.
        self._epoch += 1
        self._batch = 0
        yield items[-1]

    def _checkpoint(self, due: bool = True) -> dict[str, Any]:
        self._saved = self._step
        item = {"kind": "checkpoint", "step": self._step, "epoch": self._epoch, "position": self.position}
        return item | {"due": due}
