"""Batches for stage 0, prepared ahead of the training thread.

The coordinator sends positions in the epoch's order; the loader turns them into samples. Threads suffice: decoding and
tensor operators release the interpreter lock, and nothing has to be copied between processes.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from scpl_dist.data.source import DataSource, Split
from scpl_dist.run.errors import Aborted
from scpl_dist.run.layout import share
from scpl_dist.run.seeds import derive

Batch = tuple[Any, Tensor]
Item = TypeVar("Item")


class Loader(Generic[Item]):
    """The items of the coordinator, whatever they are, each with its batches.

    `workers` threads prepare them; with 0 they are prepared when they are asked for. Of each micro-batch this worker
    takes the share of its number among the `replicas` of its stage.
    """

    def __init__(
        self, source: DataSource, seed: int, workers: int, replica: int = 0, replicas: int = 1
    ) -> None:
        self.source = source
        self.seed = seed
        self._replica, self._replicas = replica, replicas
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._items: queue.SimpleQueue[tuple[Item, list[Future[Batch]]] | Exception] = queue.SimpleQueue()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def put(
        self,
        item: Item,
        split: Split = "train",
        epoch: int = 0,
        parts: Sequence[tuple[int, int]] = (),
        shuffled: bool = False,
    ) -> None:
        """Take an item from the coordinator and start to prepare its batches. Called by the control thread only.

        Args:
            item: what `next` gives back.
            split: where the samples come from.
            epoch: whose order and augmentation they have.
            parts: first position, and the one after the last, of each batch.
            shuffled: whether these are positions in the epoch's order of the training samples.
        """
        self._items.put((item, [self._submit(split, epoch, part, shuffled) for part in parts]))

    def abort(self, error: Exception) -> None:
        """End the training thread's wait in `next`."""
        self._items.put(error)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def next(self) -> tuple[Item, Iterator[Batch]]:
        """The next item with its batches, in order.

        Raises:
            Aborted: the run ended meanwhile.
        """
        entry = self._items.get()
        if isinstance(entry, Exception):
            raise entry
        item, futures = entry
        return item, (future.result() for future in futures)

    def queued(self) -> int:
        """Items that wait."""
        return self._items.qsize()

    def _submit(self, split: Split, epoch: int, part: tuple[int, int], shuffled: bool) -> Future[Batch]:
        if self._pool is not None:
            try:
                return self._pool.submit(self._batch, split, epoch, part, shuffled)
            except RuntimeError:  # shut down by abort()
                raise Aborted("the run ended") from None
        return _Lazy(lambda: self._batch(split, epoch, part, shuffled))

    def _batch(self, split: Split, epoch: int, part: tuple[int, int], shuffled: bool) -> Batch:
        begin, end = part
        start, stop = (begin + edge for edge in share(end - begin, self._replicas, self._replica))
        if not shuffled:
            return self.source.batch(split, epoch, torch.arange(start, stop))
        known, order = self._order
        if known != epoch:
            order = permutation(self.seed, epoch, self.source.sizes["train"])
            self._order = (epoch, order)
        return self.source.batch(split, epoch, order[start:stop])


class _Lazy(Future[Batch]):
    """A batch that is prepared when its result is asked for."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def result(self, timeout: float | None = None) -> Batch:
        batch: Batch = self._make()
        return batch


def permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    """The order of the training samples in one epoch: ``(size,)`` int64, drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(size, generator=generator)
