"""Batches for stage 0, prepared ahead of the training thread.

The coordinator sends positions in the epoch's order; the loader turns them into samples. Threads suffice: decoding and
tensor operators release the interpreter lock, and nothing has to be copied between processes. Only where samples are
drawn at random, each thread has a process to do it (`scpl_dist.data.readers`).
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.data.readers import FORKS, Readers
from scpl_dist.data.source import DataSource, Split
from scpl_dist.run.layout import share
from scpl_dist.run.seeds import derive

AHEAD_BYTES = (
    2**30
)  # that batches which wait for the training thread take together, beyond one for each thread
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
        if source.draws and not FORKS:
            workers = 0
        self._readers = Readers(source.batch, workers) if source.draws and workers else None
        self._ahead = _Ahead(workers) if workers else None
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
        if self._ahead is not None:
            batches = [self._ahead.prepare(make) for make in batches]
        self._items.put((item, batches))

    def abort(self, error: Exception) -> None:
        """End the training thread's wait, for an item or a batch: it hears the error. Nothing is prepared any more."""
        self._items.put(error)
        if self._ahead is not None:
            self._ahead.abort(error)
        if self._readers is not None:
            self._readers.close()

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
        indices = torch.arange(start, stop)
        if shuffled:
            indices = self._order(self._seed, epoch, self._source.sizes["train"])[start:stop]
        batch: Batch = (self._readers or self._source.batch)(split, epoch, indices)
        return batch


class _Ahead:
    """Threads that make batches in order, as many at once and in advance as there is memory for."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._threads = threads
        self._lock = threading.Lock()
        self._waiting: deque[tuple[_Making, Future[Batch]]] = deque()
        self._begun: set[Future[Batch]] = set()  # and not taken
        self._largest = 0  # bytes of a batch, as far as is known
        self._ended: Exception | None = None

    def prepare(self, make: _Making) -> _Making:
        """Make a batch as soon as there is room; what is returned waits for it."""
        future: Future[Batch] = Future()
        with self._lock:
            if self._ended is not None:
                future.set_exception(self._ended)
            else:
                self._waiting.append((make, future))
            self._begin()
        return partial(self._take, future)

    def abort(self, error: Exception) -> None:
        with self._lock:
            self._ended = error
            for future in [*self._begun, *(future for _, future in self._waiting)]:
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, future: Future[Batch]) -> Batch:
        try:
            return future.result()
        finally:
            with self._lock:
                self._begun.discard(future)
                self._begin()

    def _begin(self) -> None:
        """Begin what there is room for, with the lock held. Each thread has one batch, whatever its size."""
        while self._waiting and self._room():
            make, future = self._waiting.popleft()
            self._begun.add(future)
            self._pool.submit(self._make, make, future)

    def _room(self) -> bool:
        begun = len(self._begun)
        return begun < self._threads or (self._largest > 0 and (begun + 1) * self._largest <= AHEAD_BYTES)

    def _make(self, make: _Making, future: Future[Batch]) -> None:
        try:
            batch, error = make(), None
        except BaseException as raised:
            batch, error = None, raised
        with self._lock:
            if future.done():  # by an abort
                return
            if batch is None:
                future.set_exception(error)
            else:
                leaves = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
                self._largest = max(self._largest, sum(leaf.nbytes for leaf in leaves))
                future.set_result(batch)
            self._begin()


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of the training samples in one epoch: ``(size,)`` int64, drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(size, generator=generator)
