"""Messages over torch RPC (TensorPipe): TCP, from memory to memory within a host, CUDA with device maps.

RPC serves calls on a pool of threads, so two calls in flight may be handled in either order. Every message therefore
carries its number in its lane and the receiver restores the order. A call is answered when its message is *taken*,
not when it arrives: the answer is the credit, and no RPC thread ever blocks.

    sender                            RPC thread of the receiver         training thread of the receiver
    [1] post -- _deliver(n, ...) -->  [2] lane[n] = message, Future
                                                                         [3] receive(): takes lane[next]
    [5] credit  <------------------------------------------------------- [4] Future.set_result(None)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.autograd as autograd
import torch.distributed.rpc as rpc
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.futures import Future
from torch.utils import _pytree as pytree

from scpl_dist.run.errors import PeerLost
from scpl_dist.transport import Envelope, Store, Transport

# Two neighbours deliver and two answer at a time; more threads only fight for the interpreter lock.
_SERVER_THREADS = 4

# Not "shm": its thread polls without a pause and takes the processor from the stages of the same host.
TRANSPORTS = ["uv"]
# Only those, the best first, also where a stage computes on the CPU of a host with a GPU: torch probes all that it has,
# and crashes at "cuda_gdr" without the files of the driver, and at "cuda_ipc" between hosts (pytorch/pytorch#130513,
# #95487). "cma" copies large tensors of a host from process to process.
CHANNELS = ["cma", "mpt_uv", "basic"]
_GPU_CHANNELS = ["cuda_xth", "cuda_basic"]

_STORE = "scpl://"  # the address that `init_rpc` is given, as it takes no store
# The transport of this process: RPC reaches functions by name, so the receiver has to be found by name.
_transport: RpcTransport | None = None


def _find_store(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """A rendezvous for torch: with it, rank and number of workers."""
    assert _transport is not None
    yield _transport.store, _transport.rank, _transport.world


register_rendezvous_handler("scpl", _find_store)  # type: ignore[no-untyped-call]

# `init_rpc` also prepares distributed autograd, which takes a process's first rank for its rank for ever. Nothing here
# uses it, and a worker's rank changes when the workers meet anew in another number: so it is told the same always.
_prepare_autograd = autograd._init  # type: ignore[attr-defined]
autograd._init = lambda rank: _prepare_autograd(0)  # type: ignore[attr-defined, assignment]


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch has no types here
def _deliver(generation: str, source: int, number: int, message: Envelope) -> Future[None]:
    """Step [2] of the drawing, at the receiver, on an RPC thread; the future is the sender's answer."""
    if _transport is None or _transport.generation != generation:
        raise RuntimeError(f"a message of generation {generation} reached a process of another generation")
    answer: Future[None] = Future()
    try:
        with _transport.filling(source):
            _transport.arrive(source, number, message, lambda: answer.set_result(None))
    except Exception as error:  # else only the sender would hear of it
        _transport.abort(error)
        raise
    return answer


@dataclass(kw_only=True, eq=False)
class RpcTransport(Transport):
    generation: str  # identifier of this launch; messages of another one are refused
    group: int = 0  # how often this run's workers have met before
    devices: Sequence[torch.device] = ()  # where each worker computes, by rank; not needed if all do on CPUs
    store: Store = field(default=None, init=False)
    _posted: Counter[int] = field(default_factory=Counter, init=False)
    _copying: Any = field(default=None, init=False)  # a GPU's stream for what comes from a CPU

    def connect(self, store: Store) -> None:
        """Join all workers. Call it only when all of them are known to be alive: `init_rpc` has no deadline."""
        global _transport
        _transport = self
        self.store = store
        if self.device.type == "cuda":
            self._copying = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_SERVER_THREADS,
            _transports=TRANSPORTS,
            _channels=[*(_GPU_CHANNELS if self.device.type == "cuda" else []), *CHANNELS],
            init_method=_STORE,
            rpc_timeout=self.timeout_s,  # bounds the rendezvous of processes that are all alive
        )
        for peer in range(self.world):
            if peer != self.rank and self._mapped(peer):
                options.set_device_map(self._name(peer), {self.device: self.devices[peer]})
        # A part of torch's keys in the store: those who have met before and new ones must have the same.
        rpc._init_counter = self.group
        with warnings.catch_warnings(action="ignore"):  # torch warns about its own use of a process group
            rpc.init_rpc(  # type: ignore[no-untyped-call]
                self._name(self.rank),
                backend=rpc.BackendType.TENSORPIPE,  # type: ignore[attr-defined]  # registered at run time
                rank=self.rank,
                world_size=self.world,
                rpc_backend_options=options,
            )

    def close(self) -> None:
        """Leave without waiting: a graceful shutdown hangs for ever when a peer is dead."""
        global _transport
        _transport = None
        super().close()
        if rpc.api._is_current_rpc_agent_set():  # type: ignore[attr-defined]
            rpc.shutdown(graceful=False)

    def _send(self, target: int, message: Envelope) -> None:
        """Step [1]."""
        number = self._posted[target]
        self._posted[target] += 1
        if self.device.type == "cuda" and not self._mapped(target):
            message.payload = pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, message.payload)
        arguments = (self.generation, self.rank, number, message)
        try:  # without time-out: an answer means "taken", which may rightly take long; see Transport
            answer = rpc.rpc_async(self._name(target), _deliver, args=arguments, timeout=0)
        except RuntimeError as error:
            raise PeerLost(target, str(error)) from error
        answer.add_done_callback(lambda future: self._answered(target, future))

    def _answered(self, target: int, future: Future[None]) -> None:
        """Step [5], on an RPC thread: the neighbour took a message, or died."""
        try:
            future.value()
        except RuntimeError as error:
            self.abort(PeerLost(target, str(error).strip().splitlines()[-1]))
            return
        self._credit(target)

    def filling(self, source: int) -> AbstractContextManager[Any]:
        """The stream that fills the tensors of a message is the present one: RPC's own between GPUs."""
        if self._copying is None or self._mapped(source):
            return nullcontext()
        return torch.cuda.stream(self._copying)

    def _name(self, rank: int) -> str:
        """Of another group another one: torch counts its collective calls by the set of names."""
        return f"rank{rank}-{self.group}"

    def _mapped(self, peer: int) -> bool:
        """Whether tensors go from GPU to GPU."""
        return self.device.type == "cuda" and self.devices[peer].type == "cuda"
