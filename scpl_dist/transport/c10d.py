"""Messages over torch's process groups: gloo on CPUs, NCCL between GPUs.

Both complete a send only when its receive has been posted, and both can wait for ever. So the training thread never
touches them: for each neighbour and direction one thread begins what comes next, and another one waits for what was
begun. Receives of headers are posted ahead, and no message waits for the one before, so distance costs nothing where
enough of them are in flight.

    training thread      sender's threads           receiver's threads       its training thread
    post ---- parcel --> begin: header   =========> begin
                                tensors  <=ready==== their receives
                         end: waits      =========> end: waits --> lane ---> receive()
                                                                                |
    wait_for_room() <-- credit -- begin  <========= begin <----------------- "taken"

Headers go over gloo always. With NCCL each direction between two neighbours has a communicator of its own: the
operations of one communicator run one after the other, so a receive that waits would hold up a send.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_dist.run.errors import PeerLost
from scpl_dist.transport import Envelope, Store, Transport, rendezvous
from scpl_dist.transport.parcel import pack, unpack
from scpl_dist.transport.tensors import out_of_memory

# Bytes of the first frame: length of the header, and the header if it fits, as it nearly always does.
_PREAMBLE = 256
_LENGTH = 4
_TAKEN = b""  # header of the message that gives a credit back
_NEVER_SENT, _FIRST_TAG = 2, 3
_ENDED_S = 1.0  # that threads may take to end, which have nothing to wait for any more
# Header, tensors, and on a GPU the event after which they are there.
_Parcel = tuple[bytes, list[Tensor], Any]
_Begun = tuple[list[Any], list[Tensor]]  # sends, and the tensors that must live until they are over
_Coming = tuple[list[Any], int, Envelope]  # receives, number of the message in its lane, the message


@dataclass(kw_only=True, eq=False)
class C10dTransport(Transport):
    backend: str  # "gloo" or "nccl"
    links: Sequence[tuple[int, int]]  # ranks of all workers that send each other something
    _ways: dict[int, _Ways] = field(default_factory=dict, init=False)  # by neighbour

    @property
    def wire_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def connect(self, store: Store) -> None:
        limit = timedelta(seconds=self.timeout_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world, timeout=limit)
        groups: dict[tuple[int, int], Any] = {}
        if self.backend == "nccl":
            for one, other in self.links:  # all processes make all groups, in the same order
                for pair in ((one, other), (other, one)):
                    groups[pair] = rendezvous.nccl_group(sorted(pair))
        for peer in {rank for link in self.links if self.rank in link for rank in link} - {self.rank}:
            self._ways[peer] = _Ways(self, peer, groups.get((self.rank, peer)), groups.get((peer, self.rank)))

    def abort(self, error: Exception) -> None:
        super().abort(error)
        for ways in [*self._ways.values()]:
            ways.close()

    def close(self) -> None:
        """Leave, and end the waits of all threads.

        To destroy a group does not end them. But gloo closes all connections of a group in which a wait was too long.
        """
        super().close()
        rendezvous.hang_up()
        left, self._ways = self._ways, {}
        for ways in left.values():
            ways.hang_up()
        deadline = time.monotonic() + _ENDED_S
        for ways in left.values():
            ways.join(deadline)

    def _send(self, target: int, message: Envelope) -> None:
        header, tensors = pack(message)
        on_gpu = self.device.type == "cuda"
        event = torch.cuda.current_stream(self.device).record_event() if on_gpu else None
        self._ways[target].send(header, tensors, event)

    def taken(self, target: int) -> None:
        """The neighbour has taken a message. Called by a thread of its ways."""
        self._credit(target)


class _Ways:
    """Both ways between this worker and a neighbour, and their four threads; see the module.

    A thread ends when it hears None, and with the process, as it may be waiting for a dead neighbour.
    """

    def __init__(self, transport: C10dTransport, peer: int, there: Any, back: Any) -> None:
        self._transport = transport
        self._peer = peer
        self._headers = dist.group.WORLD  # the present one: who is late must not send into the next
        self._there, self._back = there or self._headers, back or self._headers  # of the tensors
        self._outbox: queue.SimpleQueue[_Parcel | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        self._coming: queue.SimpleQueue[_Coming | None] = queue.SimpleQueue()
        # As many as can be on their way: messages, and the word that one was taken for each of the other way.
        self._frames = deque(self._posted_frame() for _ in range(2 * transport.max_in_flight + 1))
        self._number = 0
        self._threads = []
        for step in (self._begin_send, self._end_send, self._begin_receive, self._end_receive):
            name = f"{step.__name__.strip('_')} {peer}"
            self._threads.append(threading.Thread(target=self._serve, args=(step,), name=name, daemon=True))
            self._threads[-1].start()

    def send(self, header: bytes, tensors: list[Tensor], event: Any = None) -> None:
        self._outbox.put((header, tensors, event))

    def close(self) -> None:
        """Begin nothing any more."""
        self._outbox.put(None)

    def hang_up(self) -> None:
        """End what was begun."""
        with suppress(RuntimeError, ValueError):
            never = dist.irecv(torch.empty(1), self._peer, group=self._headers, tag=_NEVER_SENT)
            _wait([never], timedelta(milliseconds=1))

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # Threads ----------------------------------------------------------------------------------------------------
    # Each step is a call of its own, so that nothing keeps its tensors until the next one.

    def _serve(self, step: Callable[[], bool]) -> None:
        try:
            with self._own_stream() if self._transport.device.type == "cuda" else nullcontext():
                while step():
                    pass
        except Exception as error:  # whatever it is, the training thread must not wait for them any more
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            self._transport.abort(error if out_of_memory(error) else PeerLost(self._peer, reason))
            self._begun.put(None)
            self._coming.put(None)

    def _own_stream(self) -> Any:
        device = self._transport.device
        torch.cuda.set_device(device)
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def _begin_send(self) -> bool:
        parcel = self._outbox.get()
        if parcel is None:
            self._begun.put(None)
            return False
        header, tensors, event = parcel
        if event is not None:  # before the header: a receive that is posted keeps part of its GPU busy
            event.synchronize()
            tensors = [tensor.to(self._transport.wire_device) for tensor in tensors]
        works = [
            dist.isend(frame, self._peer, group=self._headers, tag=tag)
            for tag, frame in enumerate(_frames(header))
        ]
        for tag, tensor in enumerate(tensors, _FIRST_TAG):
            works.append(dist.isend(tensor, self._peer, group=self._there, tag=tag))
        self._begun.put((works, tensors))
        return True

    def _end_send(self) -> bool:
        begun = self._begun.get()
        if begun is None:
            return False
        works, tensors = begun
        _wait(works)
        if tensors and tensors[0].is_cuda:
            torch.cuda.current_stream().synchronize()
        return True

    def _begin_receive(self) -> bool:
        header = self._header()
        if header == _TAKEN:
            self._transport.taken(self._peer)
            return True
        message, tensors = unpack(header, self._transport.wire_device)
        works = [
            dist.irecv(tensor, self._peer, group=self._back, tag=tag)
            for tag, tensor in enumerate(tensors, _FIRST_TAG)
        ]
        self._coming.put((works, self._number, message))
        self._number += 1
        return True

    def _end_receive(self) -> bool:
        coming = self._coming.get()
        if coming is None:
            return False
        works, number, message = coming
        _wait(works)
        self._transport.arrive(self._peer, number, message, lambda: self.send(_TAKEN, []))
        return True

    def _posted_frame(self) -> tuple[Any, Tensor]:
        frame = torch.empty(_PREAMBLE, dtype=torch.uint8)
        return dist.irecv(frame, self._peer, group=self._headers, tag=0), frame

    def _header(self) -> bytes:
        work, first = self._frames.popleft()
        _wait([work])
        self._frames.append(self._posted_frame())
        content = first.numpy().tobytes()
        length, header = int.from_bytes(content[:_LENGTH], "big"), content[_LENGTH:]
        if length > len(header):
            rest = torch.empty(length - len(header), dtype=torch.uint8)
            _wait([dist.irecv(rest, self._peer, group=self._headers, tag=1)])
            header += rest.numpy().tobytes()
        return header[:length]


def _frames(header: bytes) -> list[Tensor]:
    """One frame of fixed length, and a second one if the header does not fit into it."""
    room = _PREAMBLE - _LENGTH
    first = (len(header).to_bytes(_LENGTH, "big") + header[:room]).ljust(_PREAMBLE, b"\0")
    parts = [first, header[room:]] if len(header) > room else [first]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def _wait(works: Sequence[Any], limit: timedelta = rendezvous.FOREVER) -> None:
    for work in works:
        work.wait(limit)
