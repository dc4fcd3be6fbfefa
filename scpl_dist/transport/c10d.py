"""Messages over torch's process groups: gloo on CPUs, NCCL between GPUs.

Both complete a send only when its receive has been posted, and both can wait for ever. So the training thread never
touches them: for each neighbour one thread sends and one receives, and receives are always posted ahead.

    training thread          sending thread            receiving thread          training thread of the neighbour
    post -- Parcel -->       isend ... wait  ======>   irecv ... wait --> lane   receive()
                                                                                    |
    wait_for_room() <-- credit ---- receiving thread <==== sending thread <-- "taken"

Headers go over gloo always. With NCCL each direction between two neighbours has a communicator of its own: the
operations of one communicator run one after the other, so a receive that waits would hold up a send.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_dist.run.errors import PeerLost
from scpl_dist.transport import Envelope, Store, Transport
from scpl_dist.transport.parcel import pack, unpack

# Bytes of the first frame: length of the header, and the header if it fits, as it nearly always does.
_PREAMBLE = 256
_LENGTH = 4
# The control plane ends a wait (Transport.abort, then the process), not a time-out in here: an idle lane is no error.
_FOREVER = timedelta(days=365)
_TAKEN = b""  # header of the message that gives a credit back
_FIRST_TAG = 2
# Header, tensors, and on a GPU the event after which they are there.
_Parcel = tuple[bytes, list[Tensor], Any]


@dataclass(kw_only=True, eq=False)
class C10dTransport(Transport):
    backend: str  # "gloo" or "nccl"
    links: Sequence[tuple[int, int]]  # ranks of all workers that send each other something
    _outboxes: dict[int, queue.SimpleQueue[_Parcel]] = field(default_factory=dict, init=False)

    @property
    def _wire_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def connect(self, store: Store) -> None:
        limit = timedelta(seconds=self.timeout_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world, timeout=limit)
        groups: dict[tuple[int, int], Any] = {}
        if self.backend == "nccl":
            for one, other in self.links:  # all processes make all groups, in the same order
                for pair in ((one, other), (other, one)):
                    groups[pair] = dist.new_group(sorted(pair), backend="nccl")
        for peer in {rank for link in self.links if self.rank in link for rank in link} - {self.rank}:
            self._outboxes[peer] = queue.SimpleQueue()
            # They end with the process, as they may be waiting for a dead peer.
            for work, pair in ((self._send_all, (self.rank, peer)), (self._receive_all, (peer, self.rank))):
                arguments = (work, peer, groups.get(pair))
                threading.Thread(target=self._serve, args=arguments, name=f"lane {pair}", daemon=True).start()

    def _send(self, target: int, message: Envelope) -> None:
        header, tensors = pack(message)
        on_gpu = self.device.type == "cuda"
        event = torch.cuda.current_stream(self.device).record_event() if on_gpu else None
        self._outboxes[target].put((header, tensors, event))

    # Threads ----------------------------------------------------------------------------------------------------

    def _serve(self, work: Any, peer: int, group: Any) -> None:
        try:
            with self._own_stream() if self.device.type == "cuda" else nullcontext():
                work(peer, group)
        except Exception as error:  # whatever it is, the training thread must not wait for this lane any more
            lines = str(error).strip().splitlines()
            self.abort(PeerLost(peer, f"{type(error).__name__}: {lines[0] if lines else ''}"))

    def _own_stream(self) -> Any:
        torch.cuda.set_device(self.device)
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def _send_all(self, peer: int, group: Any) -> None:
        while True:
            header, tensors, event = self._outboxes[peer].get()
            if event is not None:  # before the header: a receive that is posted keeps part of its GPU busy
                event.synchronize()
                tensors = [tensor.to(self._wire_device) for tensor in tensors]
            frames = _frames(header)
            works = [dist.isend(frame, peer, tag=tag) for tag, frame in enumerate(frames)]
            for tag, tensor in enumerate(tensors, _FIRST_TAG):
                works.append(dist.isend(tensor, peer, group=group, tag=tag))
            for work in works:
                _wait(work)
            if event is not None:  # NCCL's wait is one of the stream; the tensors must live until it is over
                torch.cuda.current_stream().synchronize()

    def _receive_all(self, peer: int, group: Any) -> None:
        number = 0
        while True:
            header = _receive_header(peer)
            if header == _TAKEN:
                self._credit(peer)
                continue
            message, tensors = unpack(header, self._wire_device)
            tagged = enumerate(tensors, _FIRST_TAG)
            for work in [dist.irecv(tensor, peer, group=group, tag=tag) for tag, tensor in tagged]:
                _wait(work)
            self.arrive(peer, number, message, lambda: self._outboxes[peer].put((_TAKEN, [], None)))
            number += 1


def _frames(header: bytes) -> list[Tensor]:
    """One frame of fixed length, and a second one if the header does not fit into it."""
    room = _PREAMBLE - _LENGTH
    first = (len(header).to_bytes(_LENGTH, "big") + header[:room]).ljust(_PREAMBLE, b"\0")
    parts = [first, header[room:]] if len(header) > room else [first]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def _receive_header(peer: int) -> bytes:
    first = torch.empty(_PREAMBLE, dtype=torch.uint8)
    _wait(dist.irecv(first, peer, tag=0))
    content = first.numpy().tobytes()
    length, header = int.from_bytes(content[:_LENGTH], "big"), content[_LENGTH:]
    if length > len(header):
        rest = torch.empty(length - len(header), dtype=torch.uint8)
        _wait(dist.irecv(rest, peer, tag=1))
        header += rest.numpy().tobytes()
    return header[:length]


def _wait(work: Any) -> None:
    work.wait(_FOREVER)
