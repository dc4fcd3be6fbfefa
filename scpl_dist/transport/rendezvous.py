"""Where the workers of a run find each other: a store that the first of them serves.

torch's own rendezvous takes a port that somebody has to choose and listens on all interfaces. This one listens on the
interface of the tensors only, on a port that the kernel chose, which the others learn from the coordinator.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scpl_dist.transport import Store


def leave() -> None:
    """Leave the process groups of torch.distributed, without a word to the others: who is gone cannot answer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(
    listener: socket.socket, rank: int, endpoints: Sequence[Mapping[str, Any]], timeout_s: float
) -> Store:
    """The store of all workers, served by rank 0 on its listener; ``timeout_s`` limits every wait in it, too."""
    descriptor = listener.detach() if rank == 0 else None  # the store owns it from here on
    listener.close()
    return dist.TCPStore(  # type: ignore[attr-defined]
        str(endpoints[0]["address"]),
        int(endpoints[0]["store"]),
        world_size=len(endpoints),
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )
