"""Writes checkpoints beside the training: the training thread copies, a thread of its own writes.

    training thread:  marker --> snapshot (a copy of all tensors) --> next micro-batch ...
    a thread of its own:                  '--> serialise, hash, write, fsync --> report

The copy goes into buffers that are used again and again, and there is one set of them: a marker that comes while
the previous checkpoint is still being written waits. So memory is bounded by one copy, and a slow disk slows the
training down instead of filling the memory. Where not even one copy fits (``runtime.offload``), there is none: the
training thread writes one block after the other itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.storage.parts import part_name, write_part


class CheckpointWriter:
    """One stage's writer; its thread calls what it is given.

    `report` hears of a checkpoint on disk: its sequence number, what `write_part` says of each file, and the seconds
    that it took; `on_error` of the error that ended it, and the step. `check` gets each block's state before it is
    written, and raises if that must not be; `watch` is called with "write" before each part and "written" after it,
    and the step, for faults on purpose.
    """

    def __init__(
        self,
        report: Callable[[int, list[dict[str, Any]], float], None],
        on_error: Callable[[Exception, int], None],
        check: Callable[[int, dict[str, Any]], None] = lambda block, state: None,
        watch: Callable[[str, int], None] | None = None,
    ) -> None:
        self._report = report
        self._on_error = on_error
        self._check = check
        self._watch = watch or (lambda phase, step: None)
        self._buffers: tuple[Any, list[Any]] | None = None
        self._step = -1  # that the buffers are of
        self._writing = False
        self._changed = threading.Condition()
        self._ended: Exception | None = None

    def submit(self, sequence: int, step: int, folder: Path, state: dict[int, Any]) -> None:
        """Copy the state of each block and have it written, after a `drain`; `sequence` is that of the marker."""
        self.drain()
        leaves, structure = pytree.tree_flatten(state)
        if self._buffers is None or self._buffers[0] != structure:
            self._buffers = (structure, [None] * len(leaves))
        copies = self._buffers[1]
        for index, leaf in enumerate(leaves):
            copies[index] = _copied(leaf, copies[index])
        self._writing = True
        self._step = step
        job = (sequence, step, folder, pytree.tree_unflatten(copies, structure).items())
        threading.Thread(target=self._run, args=job, name="writer", daemon=True).start()

    def write(self, sequence: int, step: int, folder: Path, states: Iterable[tuple[int, Any]]) -> None:
        """Write the states of blocks here and now, each when it is asked for, and keep no copy; after a `drain`."""
        self.drain()
        self._step = -1
        self._writing = True
        self._run(sequence, step, folder, states)

    def kept(self, step: int, block: int) -> Any:
        """A copy of a block's state at this step, if that was submitted last, or None; after a `drain`."""
        if self._buffers is None or self._step != step:
            return None
        structure, copies = self._buffers
        state = pytree.tree_unflatten(copies, structure).get(block)
        return pytree.tree_map_only(Tensor, Tensor.clone, state)

    def drain(self) -> None:
        """Wait until everything is on disk; raises what ended the writer, or was given to `abort`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing or self._ended is not None)
            if self._ended is not None:
                raise self._ended

    def abort(self, error: Exception) -> None:
        """End every wait with this error. May be called from any thread."""
        with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()

    def _run(self, sequence: int, step: int, folder: Path, states: Iterable[tuple[int, Any]]) -> None:
        try:
            self._write(sequence, step, folder, states)
        except Exception as error:  # reported with its cause: training must not go on as if it were saved
            self.abort(error)
            self._on_error(error, step)
            return
        with self._changed:
            self._writing = False
            self._changed.notify_all()

    def _write(self, sequence: int, step: int, folder: Path, states: Iterable[tuple[int, Any]]) -> None:
        start = time.perf_counter()
        files = []
        for block, part in states:
            self._watch("write", step)
            self._check(block, part)
            files.append(write_part(folder / part_name(block), part))
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
