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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from scpl_dist.run.errors import Aborted
from scpl_dist.transport.tensors import Wide, narrow, nbytes, to_device, widen

__all__ = ["Envelope", "Store", "Transport"]

Store = Any  # a `torch.distributed.Store`, which torch exports without a type


@dataclass(slots=True)
class Envelope:
    """What travels: plain values that only the executor understands, and tensors."""

    item: dict[str, Any]
    micro_batch: int = 0
    payload: Any = None  # pytree of tensors; None for a marker
    # Share of the micro-batch in the item's loss, where that is not its share of the samples.
    weight: float | None = None
    wide: Wide = field(default_factory=list)  # what `narrow` made smaller for the way


_Arrived = tuple[Envelope, Any, Callable[[], None]]


@dataclass(kw_only=True, eq=False)
class Transport(ABC):
    """A worker's lanes to and from others, by rank. All methods but `abort` belong to the training thread.

    Each method that waits or sends raises `Aborted` when the run ended meanwhile, and `PeerLost` when a neighbour is
    gone. A wait needs no limit of its own: the control thread calls `abort` when the coordinator says so or falls
    silent, and the coordinator watches progress (``runtime.timeout_s``).
    """

    rank: int
    world: int
    max_in_flight: int
    device: torch.device  # where received tensors shall be; a message's own threads bring them there
    timeout_s: float = 60.0  # limit of `connect`
    wire_dtype: torch.dtype = torch.float32  # in which wider floats travel
    bytes_sent: int = field(default=0, init=False)
    bytes_to: Counter[int] = field(default_factory=Counter, init=False)  # those sent, by rank
    bytes_received: int = field(default=0, init=False)
    on_passed: Callable[[bool, int], None] | None = field(
        default=None, init=False
    )  # told of each: sent, rank
    # What has arrived and was not taken yet, by neighbour and number in its lane.
    _lanes: dict[int, dict[int, _Arrived]] = field(default_factory=dict, init=False)
    _taken: Counter[int] = field(default_factory=Counter, init=False)
    _untaken: Counter[int] = field(default_factory=Counter, init=False)  # posted, not taken by the neighbour
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _ended: Exception | None = field(default=None, init=False)
    _lent: list[Any] = field(default_factory=list, init=False)  # payloads as they arrived, see `lent`

    @abstractmethod
    def connect(self, store: Store) -> None:
        """Join the other workers by their common store; returns when messages can be posted."""

    @abstractmethod
    def _send(self, target: int, message: Envelope) -> None:
        """Hand over a message as it travels; the sender has the credit for it."""

    def post(self, target: int, message: Envelope) -> None:
        """Hand a message over and return at once; its tensors must not be changed afterwards."""
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._untaken[target] += 1
        payload, wide = narrow(message.payload, self.wire_dtype)
        size = nbytes(payload)
        self.bytes_sent += size
        self.bytes_to[target] += size
        if self.on_passed is not None:
            self.on_passed(True, target)
        self._send(target, replace(message, payload=payload, wide=wide))

    def wait_for_room(self, target: int) -> None:
        """Wait until fewer than ``max_in_flight`` messages to the neighbour are untaken."""
        with self._changed:
            self._wait(lambda: self._untaken[target] < self.max_in_flight)

    def receive(self, source: int) -> Envelope:
        with self._changed:
            number = self._taken[source]
            lane = self._lanes.setdefault(source, {})
            self._wait(lambda: number in lane)
            message, event, give_back = lane.pop(number)
            self._taken[source] += 1
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
            self._lent.append(message.payload)
        give_back()
        self.bytes_received += nbytes(message.payload)
        if self.on_passed is not None:
            self.on_passed(False, source)
        return replace(message, payload=widen(message.payload, message.wide), wide=[])

    def lent(self) -> list[Any]:
        """What a GPU was given to read since the last such call: hold it until the GPU has done all it was told so far.

        Its memory belongs to the stream that filled it, which would take it for the next message at once.
        """
        lent, self._lent = self._lent, []
        return lent

    def queued(self) -> int:
        return sum(map(len, self._lanes.values()))

    def close(self) -> None:
        """Leave. Never waits for a peer: the dead cannot answer."""
        self.abort(Aborted("the transport is closed"))

    def abort(self, error: Exception) -> None:
        """End every present and future wait with this error. May be called from any thread."""
        with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()

    def arrive(self, source: int, number: int, message: Envelope, give_back: Callable[[], None]) -> None:
        """A message is here, whatever order they come in; `give_back` sends its credit. Called by any thread.

        Where a GPU computes, its tensors are filled on the present stream, which the training stream has to wait for;
        those that are on the host are copied to the GPU here, beside what it computes.
        """
        event = None
        if self.device.type == "cuda":
            message.payload = to_device(message.payload, self.device)
            event = torch.cuda.current_stream(self.device).record_event()
        with self._changed:
            if self._ended is not None:  # a receive that was ended leaves anything
                return
            self._lanes.setdefault(source, {})[number] = (message, event, give_back)
            self._changed.notify_all()

    def _credit(self, target: int) -> None:
        with self._changed:
            self._untaken[target] -= 1
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()`` holds; the caller holds the condition."""
        self._changed.wait_for(lambda: ready() or self._ended is not None)
        if self._ended is not None and not ready():
            raise self._ended
