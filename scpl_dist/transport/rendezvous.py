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


def join(
    listener: socket.socket, rank: int, endpoints: Sequence[Mapping[str, Any]], timeout_s: float
) -> Store:
    """The store of all workers: rank 0 serves it on its listener, the others connect to that.

    Endpoints are those of all workers by rank, with "address", and "store", the port of the listener; ``timeout_s`` is
    the limit for this and for every wait in the store.
    """
    descriptor = listener.detach()  # the store owns it from here on
    if rank != 0:
        socket.close(descriptor)
    return dist.TCPStore(  # type: ignore[attr-defined]
        str(endpoints[0]["address"]),
        int(endpoints[0]["store"]),
        world_size=len(endpoints),
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=descriptor if rank == 0 else None,
    )


_offered: tuple[Store, int, int] | None = None


def offer(store: Store, rank: int, world: int) -> str:
    """An address under which torch's rendezvous finds this store, rank and number of workers in this process."""
    global _offered
    if _offered is None:
        register_rendezvous_handler(SCHEME, _find)  # type: ignore[no-untyped-call]
    _offered = (store, rank, world)
    return f"{SCHEME}://"


def _find(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    assert _offered is not None
    yield _offered
