"""Messages over torch RPC (TensorPipe): shared memory within a host, TCP between hosts, CUDA with device maps.

RPC serves calls on a pool of threads, so two calls in flight may be handled in either order. Every message therefore
carries its number in its lane and the receiver restores the order. A call is answered when its message is *taken*,
not when it arrives: the answer is the credit, and no RPC thread ever blocks.

    sender                        RPC thread of the receiver        training thread of the receiver
    post -- _deliver(n, ...) -->  lane[n] = message, Future
                                                                    receive(): takes lane[next]
    credit  <------------------------------------------------------ Future.set_result(None)
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch.futures import Future
from torch.utils import _pytree as pytree

from scpl_dist.transport import Aborted, Message, PeerLost, Transport

__all__ = ["RpcTransport"]

# Two neighbours deliver and two answer at a time; more threads only fight for the interpreter lock.
_SERVER_THREADS = 4

_Arrived = tuple[Message, "Future[None]", Any]

_transport: RpcTransport | None = None
"""The transport of this process: RPC reaches functions by name, so the receiver has to be found by name."""


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch has no types here
def _deliver(
    generation: str, source: int, number: int, item: dict[str, Any], micro_batch: int, payload: Any
) -> Any:
    """Runs at the receiver, on an RPC thread."""
    if _transport is None or _transport.generation != generation:
        raise RuntimeError(f"a message of generation {generation} reached a process of another generation")
    return _transport.accept(source, number, Message(item, micro_batch, payload))


class RpcTransport(Transport):
    """See the module.

    Args:
        stage: number of this stage, the rank in RPC.
        stages: number of stages.
        generation: identifier of this launch; messages of another one are refused.
        max_in_flight: credit of a lane.
        device: where received tensors shall be.
        timeout_s: limit of the rendezvous, in seconds.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        generation: str,
        max_in_flight: int,
        device: torch.device,
        timeout_s: float = 60,
    ) -> None:
        super().__init__(max_in_flight)
        self.timeout_s = timeout_s
        self.stage = stage
        self.stages = stages
        self.generation = generation
        self.device = device
        self._lanes: dict[int, dict[int, _Arrived]] = {}
        self._taken: dict[int, int] = {}
        self._posted: dict[int, int] = {}
        self._untaken: dict[int, int] = {}

    def connect(self) -> None:
        """Join all stages. Call it only when all of them are known to be alive: `init_rpc` has no deadline."""
        global _transport
        _transport = self
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_SERVER_THREADS,
            rpc_timeout=self.timeout_s,  # bounds the rendezvous of processes that are all alive
        )
        if self.device.type == "cuda":
            for peer in (self.stage - 1, self.stage + 1):
                if 0 <= peer < self.stages:
                    options.set_device_map(_name(peer), {self.device: _peer_device(peer)})
        with warnings.catch_warnings():
            # torch warns about its own use of a process group inside init_rpc
            warnings.simplefilter("ignore")
            rpc.init_rpc(  # type: ignore[no-untyped-call]
                _name(self.stage),
                backend=rpc.BackendType.TENSORPIPE,  # type: ignore[attr-defined]  # registered at run time
                rank=self.stage,
                world_size=self.stages,
                rpc_backend_options=options,
            )

    def post(self, target: int, message: Message) -> None:
        """See `Transport.post`."""
        number = self._posted.get(target, 0)
        self._posted[target] = number + 1
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._untaken[target] = self._untaken.get(target, 0) + 1
        self.bytes_sent += _bytes(message.payload)
        arguments = (self.generation, self.stage, number, message.item, message.micro_batch, message.payload)
        try:
            # No time-out: an answer means "taken", which may rightly take long; see Transport._wait.
            answer = rpc.rpc_async(_name(target), _deliver, args=arguments, timeout=0)
        except RuntimeError as error:
            raise PeerLost(target, str(error)) from error
        answer.add_done_callback(lambda future: self._answered(target, future))

    def wait_for_room(self, target: int) -> None:
        """See `Transport.wait_for_room`."""
        with self._changed:
            self._wait(lambda: self._untaken.get(target, 0) < self.max_in_flight)

    def receive(self, source: int) -> Message:
        """See `Transport.receive`."""
        with self._changed:
            number = self._taken.get(source, 0)
            lane = self._lanes.setdefault(source, {})
            self._wait(lambda: number in lane)
            message, answer, event = lane.pop(number)
            self._taken[source] = number + 1
        if event is not None:
            _adopt(message.payload, event)
        answer.set_result(None)
        self.bytes_received += _bytes(message.payload)
        return message

    def queued(self) -> int:
        """See `Transport.queued`."""
        return sum(map(len, self._lanes.values()))

    def close(self) -> None:
        """Leave without waiting: a graceful shutdown hangs for ever when a peer is dead."""
        global _transport
        _transport = None
        self.abort(Aborted("the transport is closed"))
        if rpc.api._is_current_rpc_agent_set():  # type: ignore[attr-defined]
            rpc.shutdown(graceful=False)

    def accept(self, source: int, number: int, message: Message) -> Future[None]:
        """Put an arrived message into its lane; the future is the sender's answer."""
        answer: Future[None] = Future()
        event = None
        if self.device.type == "cuda":
            # RPC fills CUDA tensors on a stream of its own pool; the training stream waits for this event.
            event = torch.cuda.current_stream(self.device).record_event()
        with self._changed:
            self._lanes.setdefault(source, {})[number] = (message, answer, event)
            self._changed.notify_all()
        return answer

    def _answered(self, target: int, future: Future[None]) -> None:
        """Runs on an RPC thread when the neighbour took a message, or died."""
        try:
            future.value()
        except RuntimeError as error:
            self.abort(PeerLost(target, str(error).strip().splitlines()[-1]))
            return
        with self._changed:
            self._untaken[target] -= 1
            self._changed.notify_all()


def _name(stage: int) -> str:
    return f"stage{stage}"


def _bytes(payload: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(payload) if isinstance(leaf, torch.Tensor))


def _adopt(payload: Any, event: Any) -> None:
    """Let the training stream wait for received CUDA tensors and keep their memory until it used them."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for leaf in pytree.tree_leaves(payload):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)


def _peer_device(peer: int) -> torch.device:
    """Device of a peer: workers of a host take its GPUs in the order of their local rank."""
    return torch.device(
        "cuda", peer % int(os.environ.get("LOCAL_WORLD_SIZE", "1")) % torch.cuda.device_count()
    )
