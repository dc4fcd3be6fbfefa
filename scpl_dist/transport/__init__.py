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
from dataclasses import dataclass, field
from typing import Any

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
        wide: numbers of the payload's leaves that travel in a smaller type, and their own; empty at the executor.
    """

    item: dict[str, Any]
    micro_batch: int = 0
    payload: Any = field(default=None)
    wide: list[tuple[int, str]] = field(default_factory=list)


class Transport(ABC):
    """A worker's lanes to and from others, by rank. All methods but `abort` belong to the training thread.

    Attributes:
        bytes_sent: bytes of tensors posted so far.
        bytes_received: bytes of tensors received so far.
    """

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.bytes_sent = 0
        self.bytes_received = 0
        self._untaken: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ended: Exception | None = None

    @abstractmethod
    def connect(self, store: Store) -> None:
        """Join the other workers by their common store; returns when messages can be posted."""

    @abstractmethod
    def post(self, target: int, message: Envelope) -> None:
        """Hand a message over and return at once; its tensors must not be changed afterwards.

        Raises:
            PeerLost: the neighbour is gone.
        """

    def wait_for_room(self, target: int) -> None:
        """Wait until fewer than ``max_in_flight`` messages to the neighbour are untaken.

        Raises:
            Aborted: the run ended meanwhile.
            PeerLost: the neighbour is gone.
        """
        with self._changed:
            self._wait(lambda: self._untaken.get(target, 0) < self.max_in_flight)

    @abstractmethod
    def receive(self, source: int) -> Envelope:
        """Take the next message of a neighbour.

        Raises:
            Aborted: the run ended meanwhile.
            PeerLost: the neighbour is gone.
        """

    @abstractmethod
    def queued(self) -> int:
        """Messages that have arrived and were not taken."""

    @abstractmethod
    def close(self) -> None:
        """Leave. Never waits for a peer: the dead cannot answer."""

    def abort(self, error: Exception) -> None:
        """End every present and future wait with this error. May be called from any thread."""
        with self._changed:
            if self._ended is None:
                self._ended = error
            self._changed.notify_all()

    def _claim(self, target: int) -> None:
        """Use one credit of a lane."""
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._untaken[target] = self._untaken.get(target, 0) + 1

    def _credit(self, target: int) -> None:
        """The neighbour took a message."""
        with self._changed:
            self._untaken[target] -= 1
            self._changed.notify_all()

    def _wait(self, ready: Any) -> None:
        """Wait under ``_changed`` until ``ready()`` holds; the caller holds the condition.

        The wait needs no limit of its own: the control thread calls `abort` when the coordinator says so or falls
        silent, and the coordinator watches progress (``runtime.timeout_s``).
        """
        while not ready():
            if self._ended is not None:
                raise self._ended
            self._changed.wait()
