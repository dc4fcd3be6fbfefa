"""Processes that read a data set whose samples may be drawn at random.

The generators of torch, numpy and ``random`` belong to a process: a sample that is drawn in a thread takes from what
dropout draws, and the other way round. Such samples are read elsewhere, then:

    thread of the loader --- split, epoch, positions ---> reader, a fork of the worker: DataSource.batch
                        <--- the batch, or what it raised ---

As a gain, samples are read on several cores. Readers know nothing of the run, and die with the worker.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from io import BufferedRWPair
from typing import Any

import numpy as np
import setproctitle
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.run.descent import die_with_parent

FORKS = sys.platform.startswith("linux")
"""Whether there can be readers: elsewhere a fork of a process with threads does not work."""


class Readers:
    """So many processes that call a function; it may be called by as many threads at once.

    They end with the thread that has made them, if `close` is not called before.
    """

    def __init__(self, function: Callable[..., Any], processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._free: queue.SimpleQueue[BufferedRWPair] = queue.SimpleQueue()
        self._processes = []
        ends: list[BufferedRWPair] = []
        for _ in range(processes):
            ours, theirs = _pipe()
            ends.append(ours)
            process = context.Process(target=_serve, args=(function, theirs, list(ends)), daemon=True)
            process.start()
            theirs.close()
            self._free.put(ours)
            self._processes.append(process)

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives or raises, in a free reader."""
        reader = self._free.get()
        try:
            _send(arguments, reader)
            raised, answer = _receive(reader)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise RuntimeError(
                "a process that reads the data set has died, perhaps because the memory was full; "
                "data.workers = 0 reads it in the worker itself"
            ) from None
        finally:
            self._free.put(reader)
        if raised:
            raise answer
        return answer

    def close(self) -> None:
        """End the processes; whoever waits for one hears that it has died."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(1.0)


def _pipe() -> Iterator[BufferedRWPair]:
    """Its two ends."""
    for end in socket.socketpair():
        with end:  # the file keeps it open
            yield end.makefile("rwb")


def _serve(
    function: Callable[..., Any], requests: BufferedRWPair, of_parent: Sequence[BufferedRWPair]
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the worker decides what they mean
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # it is the worker's
    die_with_parent()
    setproctitle.setproctitle("scpl-dist: reader")
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
    for connection in of_parent:
        connection.close()
    while True:
        try:
            arguments = _receive(requests)
        except EOFError:
            return
        _send(_answer(function, arguments), requests)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether something was raised, and that or the result."""
    try:
        return False, function(*arguments)
    except Exception as error:
        traceback.print_exc()
        try:
            return True, pickle.loads(pickle.dumps(error))  # some exceptions can be written but not read
        except Exception:
            return True, RuntimeError(f"{type(error).__name__}: {error}")


def _send(value: Any, to: BufferedRWPair) -> None:
    """Tensors go as arrays, which need no shared memory: containers have little of it."""
    # With this protocol arrays are written from where they are, and read to where they shall be.
    pickle.dump(pytree.tree_map_only(Tensor, _plain, value), to, protocol=5)
    to.flush()


def _receive(come_from: BufferedRWPair) -> Any:
    return pytree.tree_map_only(np.ndarray, torch.from_numpy, pickle.load(come_from))


def _plain(tensor: Tensor) -> Any:
    try:
        return tensor.numpy()
    except TypeError:  # numpy has no such type
        return tensor
