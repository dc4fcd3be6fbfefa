"""Keeps what the blocks of a stage learn with elsewhere, but for the block at work and the next one on its way.

    training thread    HAVE0 FETCH1 F0 LOSS0 B0 STEP0 PUT0 | HAVE1 FETCH2 F1 LOSS1 B1 STEP1 PUT1 | HAVE2 ...
    a thread of its own         read 1              write 0        read 2              write 1

Where blocks learn alone, one has finished its update before the next one starts, so nothing ever needs two of them.
The thread does one thing after the other, in the order in which it was asked: it writes a block before it reads the
next but one, which is why there are never more than two. A tensor stays the same object all the time: it is its memory
that is given back and asked for again, so optimizers, compiled code and averages notice nothing.

Weights, gradients, averages and the states of optimizers go. Buffers stay, such as BatchNorm's statistics: they are
small, a forward pass may change them, and a model may share one between its blocks.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils import _pytree as pytree

from scpl_dist.methods.block import Carry
from scpl_dist.run.config import Config
from scpl_dist.worker.updater import Updater

_STAGED = 16 << 20  # bytes of a GPU's memory that go through the host at once


class Place(Protocol):
    """Where the bytes of a block are while it is away; `parts` are uint8 tensors, (bytes,), on the device."""

    def write(self, block: int, parts: list[Tensor]) -> None: ...

    def read(self, block: int, parts: list[Tensor]) -> None: ...

    def forget(self, block: int) -> None: ...


class Offload:
    """The blocks of a stage, and which of them are on the device; all calls are the training thread's.

    What goes wrong in the thread, such as an OSError of a full disk, is raised when the block is needed next.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self._place = place
        self.updaters: dict[int, Updater] = {}
        # What is in a place, with bytes, in order.
        self.stored: dict[int, list[tuple[UntypedStorage, int]]] = {}
        self._here: dict[int, Future[None]] = {}  # done when the block is on the device
        self._away: dict[int, Future[None]] = {}  # done when it has left it
        self._changed: set[int] = set()  # those here that differ from what is stored
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._device = device
        # On a GPU copies are made beside the computation. Memory that is fetched is this stream's.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def add(self, block: int, updater: Updater) -> None:
        """A new block, which is on the device."""
        self.updaters[block] = updater
        self._here[block] = Future()
        self._here[block].set_result(None)
        self._changed.add(block)

    def fetch(self, block: int) -> None:
        """Begin to bring a block to the device, if that was not begun before."""
        if block not in self._here:
            leaving = self._away.pop(block)
            used = None if self._stream is None else torch.cuda.current_stream(self._device)
            self._here[block] = self._thread.submit(self._read, block, leaving, used)

    def have(self, block: int) -> None:
        """Wait until a block is on the device."""
        self.fetch(block)
        self._here[block].result()

    def change(self, block: int) -> None:
        """What is stored of a block that is on the device is not right any more."""
        self._changed.add(block)

    def put(self, block: int, wait: bool = False) -> None:
        """Begin to put a block away, which is written only if it was changed; perhaps wait for the end of it."""
        changed = block in self._changed
        if changed:
            self._changed.remove(block)
            self.stored[block] = list(_memory(self.updaters[block], self._device))
        used = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        del self._here[block]
        self._away[block] = self._thread.submit(self._write, block, changed, used)
        if wait:
            self._away[block].result()

    def apart(self, block: int, carry: Carry) -> Carry:
        """The carry with a copy of what is a part of a block's weights: it is needed when these have left."""
        weights = self.updaters[block].trainable.parameters()
        own = {one.untyped_storage().data_ptr() for one in weights}
        return pytree.tree_map_only(
            Tensor, lambda one: one.clone() if one.untyped_storage().data_ptr() in own else one, carry
        )

    def keep(self, blocks: Set[int]) -> None:
        """Forget all other blocks, wherever they are."""
        for block in self.updaters.keys() - blocks:
            self._thread.submit(self._place.forget, block).result()
            for known in (self.updaters, self._here, self._away, self.stored):
                known.pop(block, None)
            self._changed.discard(block)

    def close(self) -> None:
        """End the thread, and forget all blocks."""
        self.keep(set())
        self._thread.shutdown()

    def _write(self, block: int, changed: bool, used: Any) -> None:
        storages = self.stored[block]
        if self._stream is not None:
            self._stream.wait_event(used)  # until then the device computes with what goes
        with self._beside():
            if changed:
                self._place.write(block, [self._bytes(storage) for storage, _ in storages])
        if self._stream is not None:
            self._stream.synchronize()
        for storage, _ in storages:
            storage.resize_(0)

    def _read(self, block: int, leaving: Future[None], used: Any) -> None:
        leaving.result()  # done before, as there is one thread; it may have failed
        parts = []
        with self._beside():
            for storage, size in self.stored[block]:
                storage.resize_(size)
                parts.append(self._bytes(storage))
            self._place.read(block, parts)
        if self._stream is not None:
            # What the training thread drops is not this stream's before the device is done with it. The rest is given
            # back by `_write`, after that: to record it would keep its memory from the block that is read next.
            parameters = self.updaters[block].trainable.parameters()
            dropped = {one.grad.data_ptr() for one in parameters if one.grad is not None}
            for part in parts:
                if part.data_ptr() in dropped:
                    part.record_stream(used)
            self._stream.synchronize()

    def _beside(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _bytes(self, storage: UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _memory(updater: Updater, device: torch.device) -> Iterator[tuple[UntypedStorage, int]]:
    """Each piece of the device's memory that a block's tensors lie in, once, and its bytes."""
    found: dict[int, UntypedStorage] = {}
    for tensor in updater.tensors():
        storage = tensor.untyped_storage()
        if (
            storage.device.type != device.type
        ):  # as the number of steps, which most optimizers keep on the host
            continue
        if storage.resizable() and storage.nbytes():  # memory that is not torch's own stays, such as numpy's
            found[storage.data_ptr()] = storage
    return ((storage, storage.nbytes()) for storage in found.values())


def make(config: Config, device: torch.device, run_dir: Path) -> Offload | None:
    """As ``runtime.offload`` says; None if everything stays on the device."""
    match config.runtime.offload:
        case "disk":
            return Offload(Disk(Path(config.runtime.offload_folder or run_dir)), device)
        case "cpu":
            return Offload(Host(), device)
        case _:
            return None


class Disk:
    """A file for each block in a folder; they have no name, so the kernel removes them when this process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[int, BinaryIO] = {}
        self._staging: Tensor | None = None

    def write(self, block: int, parts: list[Tensor]) -> None:
        try:
            self._write(block, parts)
        except OSError as error:  # the file has no name that could say where the disk is full
            text = f"{error.strerror}, where runtime.offload keeps blocks that are away"
            raise OSError(error.errno, text, str(self._folder)) from error

    def _write(self, block: int, parts: list[Tensor]) -> None:
        if block not in self.files:
            self.files[block] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        number, position = self.files[block].fileno(), 0
        for part in self._on_host(parts):
            left = _view(part)
            while left:
                count = os.pwrite(number, left, position)
                left, position = left[count:], position + count

    def read(self, block: int, parts: list[Tensor]) -> None:
        number, position = self.files[block].fileno(), 0
        for part in parts:
            for target in _pieces(part):
                host = target if target.is_cpu else self._stage(target)
                left = _view(host)
                while left:
                    count = os.preadv(number, [left], position)
                    if not count:
                        raise EOFError(f"{self._folder}: the file of block {block} ends at {position} bytes")
                    left, position = left[count:], position + count
                if host is not target:
                    target.copy_(host)

    def forget(self, block: int) -> None:
        file = self.files.pop(block, None)
        if file is not None:
            file.close()

    def _on_host(self, parts: list[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            for source in _pieces(part):
                yield source if source.is_cpu else self._stage(source).copy_(source)

    def _stage(self, piece: Tensor) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True)
        return self._staging[: len(piece)]


class Host:
    """Pinned memory of the host, for stages that compute on a GPU."""

    def __init__(self) -> None:
        self._held: dict[int, list[Tensor]] = {}

    def write(self, block: int, parts: list[Tensor]) -> None:
        held = self._held.get(block, [])
        if [len(one) for one in held] != [len(part) for part in parts]:
            held = [torch.empty_like(part, device="cpu", pin_memory=part.is_cuda) for part in parts]
        for one, part in zip(held, parts, strict=True):
            one.copy_(part, non_blocking=True)
        self._held[block] = held

    def read(self, block: int, parts: list[Tensor]) -> None:
        for part, one in zip(parts, self._held[block], strict=True):
            part.copy_(one, non_blocking=True)

    def forget(self, block: int) -> None:
        self._held.pop(block, None)


def _pieces(part: Tensor) -> tuple[Tensor, ...]:
    return (part,) if part.is_cpu else part.split(_STAGED)  # type: ignore[no-untyped-call]


def _view(part: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not a copy; torch's own way through numpy would fix the size of its memory."""
    return memoryview((ctypes.c_char * len(part)).from_address(part.data_ptr())).cast("B")
