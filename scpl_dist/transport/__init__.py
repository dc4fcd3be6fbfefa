"""How activations, labels, gradients and markers travel between the workers of neighbouring stages.

A transport is one small interface, `Transport`, between ranks; `scpl_dist.transport.neighbours` makes stages of them.
Messages of a lane (sender, receiver) arrive in the order in which they were sent, each tensor with its values, dtype
and strides. A lane holds at most ``max_in_flight`` messages that its receiver has not taken: that is the credit of
the sender.

    sender                                        receiver
    wait_for_room()   <-- a taken message --      receive()     takes message 0
    post(1)           ----- tensors ------->      lane: 1 2     (max_in_flight = 2)
    backward pass     (the tensors travel         backward pass
                       in the meantime)
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from scpl_dist.transport.tensors import Wide, narrow, nbytes, widen

__all__ = ["Envelope", "Store", "Transport"]

Store = Any
"""A `torch.distributed.Store`, which torch exports without a type."""


@dataclass(slots=True)
class Envelope:
    """What travels: the item it belongs to, and a pytree of tensors.

    Attributes:
        item: what it belongs to, plain values that only the executor understands.
        micro_batch: number of the micro-batch within the item.
        payload: pytree of tensors; None for a marker.
        wide: of the payload's leaves on their way, see `scpl_dist.transport.tensors.narrow`.
    """

    item: dict[str, Any]
    micro_batch: int = 0
    payload: Any = None
    wide: Wide = field(default_factory=list)


class Transport(ABC):
    """A worker's lanes to and from others, by rank. All methods but `abort` belong to the training thread.

    Each method that waits or sends raises `Aborted` when the run ended meanwhile, and `PeerLost` when a neighbour is
    gone. A wait needs no limit of its own: the control thread calls `abort` when the coordinator says so or falls
    silent, and the coordinator watches progress (``runtime.timeout_s``).

    Attributes:
        wire_dtype: type in which float32 tensors travel.
        bytes_sent: bytes of tensors posted so far.
        bytes_received: bytes of tensors received so far.
    """

    def __init__(self, max_in_flight: int, wire_dtype: torch.dtype = torch.float32) -> None:
        self.max_in_flight = max_in_flight
        self.wire_dtype = wire_dtype
        self.bytes_sent = 0
        self.bytes_received = 0
        self._untaken: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ended: Exception | None = None

    @abstractmethod
    def connect(self, store: Store) -> None:
        """Join the other workers by their common store; returns when messages can be posted."""

    @abstractmethod
    def queued(self) -> int:
        """Messages that have arrived and were not taken."""

    @abstractmethod
    def close(self) -> None:
        """Leave. Never waits for a peer: the dead cannot answer."""

    @abstractmethod
    def _send(self, target: int, message: Envelope) -> None:
        """Hand over a message as it travels; the sender has the credit for it."""

    @abstractmethod
    def _take(self, source: int) -> Envelope:
        """Wait for the next message of a lane, give its credit back, and return it with tensors of this device."""

    def post(self, target: int, message: Envelope) -> None:
        """Hand a message over and return at once; its tensors must not be changed afterwards."""
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._untaken[target] = self._untaken.get(target, 0) + 1
        payload, wide = narrow(message.payload, self.wire_dtype)
        self.bytes_sent += nbytes(payload)
        self._send(target, Envelope(message.item, message.micro_batch, payload, wide))

    def wait_for_room(self, target: int) -> None:
        """Wait until fewer than ``max_in_flight`` messages to the neighbour are untaken."""
        with self._changed:
            self._wait(lambda: self._untaken.get(target, 0) < self.max_in_flight)

    def receive(self, source: int) -> Envelope:
        """Take the next message of a neighbour."""
        message = self._take(source)
        self.bytes_received += nbytes(message.payload)
        return Envelope(message.item, message.micro_batch, widen(message.payload, message.wide))

    def abort(self, error: Exception) -> None:
        """End every present and future wait with this error. May be called from any thread."""
        with self._changed:
            if self._ended is None:
                self._ended = error
            self._changed.notify_all()

    def _credit(self, target: int) -> None:
        """The neighbour took a message."""
        with self._changed:
            self._untaken[target] -= 1
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()`` holds; the caller holds the condition."""
        while not ready():
            if self._ended is not None:
                raise self._ended
            self._changed.wait()
