"""Batches for stage 0, prepared ahead of the training thread.

The coordinator sends positions in the epoch's order; the loader turns them into samples. Threads suffice: decoding and
tensor operators release the interpreter lock, and nothing has to be copied between processes.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from scpl_dist.data.source import DataSource, Split
from scpl_dist.run.errors import Aborted
from scpl_dist.run.layout import share
from scpl_dist.run.seeds import derive

Batch = tuple[Any, Tensor]
Item = TypeVar("Item")
_Making = Callable[[], Batch]  # makes a batch, or waits until it is made


class Loader(Generic[Item]):
    """The items of the coordinator, whatever they are, each with its batches.

    `workers` threads prepare them; with 0 they are prepared when they are asked for. Of each micro-batch this worker
    takes the share of its number among the `replicas` of its stage.
    """

    def __init__(
        self, source: DataSource, seed: int, workers: int, replica: int = 0, replicas: int = 1
    ) -> None:
        self._source = source
        self._seed = seed
        self._replica, self._replicas = replica, replicas
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._items: queue.SimpleQueue[tuple[Item, Sequence[_Making]] | Exception] = queue.SimpleQueue()
        self._order = lru_cache(maxsize=1)(permutation)

    def put(
        self,
        item: Item,
        split: Split = "train",
        epoch: int = 0,
        parts: Sequence[tuple[int, int]] = (),
        shuffled: bool = False,
    ) -> None:
        """Take an item from the control thread and start to prepare its batches.

        `parts` are the first position and the one after the last of each; if `shuffled`, in the epoch's order.
        """
        batches: list[_Making] = [partial(self._batch, split, epoch, part, shuffled) for part in parts]
        if self._pool is not None:
            try:
                batches = [self._pool.submit(make).result for make in batches]
            except RuntimeError:  # shut down by abort()
                raise Aborted("the run ended") from None
        self._items.put((item, batches))

    def abort(self, error: Exception) -> None:
        """End the training thread's wait in `next`."""
        self._items.put(error)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def next(self) -> tuple[Item, Iterator[Batch]]:
        """The next item with its batches, in order; raises what `abort` was given."""
        entry = self._items.get()
        if isinstance(entry, Exception):
            raise entry
        item, batches = entry
        return item, (batch() for batch in batches)

    def queued(self) -> int:
        return self._items.qsize()

    def _batch(self, split: Split, epoch: int, part: tuple[int, int], shuffled: bool) -> Batch:
        begin, end = part
        start, stop = (begin + edge for edge in share(end - begin, self._replicas, self._replica))
        if not shuffled:
            return self._source.batch(split, epoch, torch.arange(start, stop))
        order = self._order(self._seed, epoch, self._source.sizes["train"])
        return self._source.batch(split, epoch, order[start:stop])


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of the training samples in one epoch: ``(size,)`` int64, drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(size, generator=generator)
