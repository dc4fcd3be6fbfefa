"""Batches for stage 0, prepared ahead of the training thread.

The coordinator sends positions in the epoch's order; the loader turns them into samples. Threads suffice: decoding and
tensor operators release the interpreter lock, and nothing has to be copied between processes. Only where samples are
drawn at random, each thread has a process to do it (`scpl_dist.data.readers`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.data.readers import FORKS, Readers
from scpl_dist.data.sampling import draws, permutation
from scpl_dist.data.source import DataSource, Split
from scpl_dist.run.layout import share

AHEAD_BYTES = 2**30  # of batches that wait for the training thread, beyond one for each thread
Batch = tuple[Any, Tensor]
Item = TypeVar("Item")
_Making = Callable[[], Batch]  # makes a batch, or waits until it is made


class Loader(Generic[Item]):
    """The items of the coordinator, whatever they are, each with its batches.

    `workers` threads prepare them; with 0 they are prepared when they are asked for. Of each micro-batch this worker
    takes its `share`. `weights` are those of `sampling.weights_of`. A GPU reads `pinned` batches by itself, while the
    training thread goes on.
    """

    def __init__(
        self,
        source: DataSource,
        seed: int,
        workers: int,
        weights: Tensor | None = None,
        pinned: bool = False,
    ) -> None:
        self._source = source
        self._seed = seed
        # Number of replicas of its stage, and which of them it is, in the group that the next items are for.
        self.share = (1, 0)
        if source.draws and not FORKS:
            workers = 0
        self._readers = Readers(source.batch, workers) if source.draws and workers else None
        self._ahead = _Ahead(workers) if workers else None
        self._items: queue.SimpleQueue[tuple[Item, Sequence[_Making]] | Exception] = queue.SimpleQueue()
        self._weights = weights
        self._pinned = pinned
        self._ended: Exception | None = None
        self._order = lru_cache(maxsize=1)(self._ordered)

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
        if self._ahead is not None:
            batches = [self._ahead.prepare(make) for make in batches]
        self._items.put((item, batches))

    def abort(self, error: Exception) -> None:
        """End the training thread's wait, for an item or a batch: it hears the error. Nothing is prepared any more."""
        self._ended = error
        self._items.put(error)
        if self._ahead is not None:
            self._ahead.abort(error)
        if self._readers is not None:
            self._readers.close()

    def next(self) -> tuple[Item, Iterator[Batch]]:
        """The next item with its batches, in order; raises what `abort` was given."""
        entry = self._items.get()
        if self._ended is not None:
            raise self._ended
        assert not isinstance(entry, Exception)
        item, batches = entry
        return item, (batch() for batch in batches)

    def queued(self) -> int:
        return self._items.qsize()

    def _batch(self, split: Split, epoch: int, part: tuple[int, int], shuffled: bool) -> Batch:
        begin, end = part
        start, stop = (begin + edge for edge in share(end - begin, *self.share))
        indices = torch.arange(start, stop)
        if shuffled:
            indices = self._order(epoch)[start:stop]
        batch: Batch = (self._readers or self._source.batch)(split, epoch, indices)
        if self._pinned:
            batch = pytree.tree_map_only(Tensor, Tensor.pin_memory, batch)
        return batch

    def _ordered(self, epoch: int) -> Tensor:
        if self._weights is not None:
            return draws(self._weights, self._seed, epoch)
        return permutation(self._seed, epoch, self._source.sizes["train"])


class _Ahead:
    """Threads that make batches in advance: as many as there is memory for, and in any case one for each thread."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._threads = threads
        self._changed = threading.Condition()
        self._made: dict[int, Future[Batch]] = {}  # and not taken, by number
        self._given = self._begun = self._taken = 0
        self._largest = 0  # bytes of a batch, as far as is known
        self._ended: Exception | None = None

    def prepare(self, make: _Making) -> _Making:
        """Make a batch as soon as its turn has come; what is returned waits for it. They are taken in order."""
        number, self._given = self._given, self._given + 1
        with suppress(RuntimeError):  # shut down by `abort`, which `_take` tells
            self._pool.submit(self._make, number, make)
        return partial(self._take, number)

    def abort(self, error: Exception) -> None:
        with self._changed:
            self._ended = error
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, number: int, make: _Making) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or self._room(number))
            self._begun += 1
            self._changed.notify_all()
        if self._ended is not None:
            return
        made: Future[Batch] = Future()
        try:
            batch = make()
            leaves = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
            self._largest = max(self._largest, sum(leaf.nbytes for leaf in leaves))
            made.set_result(batch)
        except BaseException as error:
            made.set_exception(error)
        with self._changed:
            self._made[number] = made
            self._changed.notify_all()

    def _room(self, number: int) -> bool:
        """Whether it is this batch's turn, and there is memory for it."""
        ahead = number + 1 - self._taken
        return number == self._begun and (ahead <= self._threads or 0 < ahead * self._largest <= AHEAD_BYTES)

    def _take(self, number: int) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or number in self._made)
            if self._ended is not None:
                raise self._ended
            self._taken = number + 1
            self._changed.notify_all()
            made = self._made.pop(number)
        return made.result()
