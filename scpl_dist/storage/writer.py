"""Writes checkpoints beside the training: the training thread copies, a thread of its own writes.

    training thread:  marker --> snapshot (a copy of all tensors) --> next micro-batch ...
    writer thread:                        '--> serialise, hash, write, fsync --> report

The copy goes into buffers that are used again and again, and there is one set of them: a marker that comes while
the previous checkpoint is still being written waits. So memory is bounded by one copy, and a slow disk slows the
training down instead of filling the memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.storage.parts import part_name, write_part


class CheckpointWriter:
    """One stage's writer.

    Args:
        report: called in the writer's thread when a checkpoint is on disk, with its sequence number, what
            `write_part` says of each file, and the seconds that it took.
        on_error: called in the writer's thread with the error that ended it and the step of the checkpoint.
        watch: called with "write" before each part and "written" after it, and the step; for faults on purpose.
    """

    def __init__(
        self,
        report: Callable[[int, list[dict[str, Any]], float], None],
        on_error: Callable[[Exception, int], None],
        watch: Callable[[str, int], None] | None = None,
    ) -> None:
        self._report = report
        self._on_error = on_error
        self._watch = watch
        self._buffers: tuple[Any, list[Any]] | None = None
        self._job: tuple[int, int, Path, dict[int, Any]] | None = None
        self._changed = threading.Condition()
        self._ended: Exception | None = None
        self._thread: threading.Thread | None = None

    def submit(self, sequence: int, step: int, folder: Path, state: dict[int, Any]) -> None:
        """Copy a state and have it written; waits for the previous one to be on disk.

        Args:
            sequence: number of the checkpoint's item.
            step: steps done.
            folder: where the parts go.
            state: what to write of each block.

        Raises:
            Exception: that of the previous write, or that given to `abort`.
        """
        self.drain()
        leaves, structure = pytree.tree_flatten(state)
        if self._buffers is None or self._buffers[0] != structure:
            self._buffers = (structure, [None] * len(leaves))
        copies = self._buffers[1]
        for index, leaf in enumerate(leaves):
            copies[index] = _copied(leaf, copies[index])
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
            self._thread.start()
        with self._changed:
            self._job = (sequence, step, folder, pytree.tree_unflatten(copies, structure))
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything is on disk.

        Raises:
            Exception: that of the write, or that given to `abort`.
        """
        with self._changed:
            while self._job is not None and self._ended is None:
                self._changed.wait()
            if self._ended is not None:
                raise self._ended

    def abort(self, error: Exception) -> None:
        """End every wait with this error. May be called from any thread."""
        with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._job is None:
                    self._changed.wait()
                sequence, step, folder, state = self._job
            try:
                self._write(sequence, step, folder, state)
            except Exception as error:  # reported with its cause: training must not go on as if it were saved
                self.abort(error)
                self._on_error(error, step)
                return
            with self._changed:
                self._job = None
                self._changed.notify_all()

    def _write(self, sequence: int, step: int, folder: Path, state: dict[int, Any]) -> None:
        start = time.perf_counter()
        files = []
        for block, part in state.items():
            path = folder / part_name(block)
            if self._watch is not None:
                self._watch("write", step)
            files.append(write_part(path, part))
            if self._watch is not None:
                self._watch("written", step)
        self._report(sequence, files, time.perf_counter() - start)


def _copied(leaf: Any, buffer: Any) -> Any:
    """The leaf in memory that training does not touch: the CPU, in the buffer if it fits."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    if isinstance(buffer, Tensor) and buffer.shape == leaf.shape and buffer.dtype == leaf.dtype:
        return buffer.copy_(leaf)
    return torch.empty_like(leaf, device="cpu", memory_format=torch.contiguous_format).copy_(leaf)
