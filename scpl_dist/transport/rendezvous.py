"""Where the workers of a run find each other: a store that the first of them serves.

torch's own rendezvous takes a port that somebody has to choose and listens on all interfaces. This one listens on the
interface of the tensors only, on a port that the kernel chose, which the others learn from the coordinator.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

from scpl_dist.transport import Store

SCHEME = "scpl"
"""Of the address that `init_rpc` is given instead of a store, which it does not take."""


class Rendezvous:
    """This worker's offer to serve the store.

    Args:
        address: own address on the interface of the tensors.

    Attributes:
        port: where it listens, for the endpoint that the others are told.
    """

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    def join(self, rank: int, endpoints: Sequence[Mapping[str, Any]], timeout_s: float) -> Store:
        """The store of all workers: rank 0 serves it, the others connect.

        Args:
            rank: of this worker.
            endpoints: of all workers by rank, with "address" and "store", a port.
            timeout_s: limit for this and for every wait in the store, in seconds.
        """
        first = endpoints[0]
        listener = self._listener.detach()  # the store owns it from here on
        if rank != 0:
            socket.close(listener)
        return dist.TCPStore(  # type: ignore[attr-defined]
            str(first["address"]),
            int(first["store"]),
            world_size=len(endpoints),
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener if rank == 0 else None,
        )


_store: tuple[Store, int, int] | None = None


def offer(store: Store, rank: int, world: int) -> str:
    """An address under which torch's rendezvous finds this store, rank and number of workers in this process."""
    global _store
    if _store is None:
        register_rendezvous_handler(SCHEME, _find)  # type: ignore[no-untyped-call]
    _store = (store, rank, world)
    return f"{SCHEME}://"


def _find(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    assert _store is not None
    yield _store
