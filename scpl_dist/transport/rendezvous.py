"""Where the workers of a run find each other: a store that the first of them serves.

torch's own rendezvous takes a port that somebody has to choose and listens on all interfaces. This one listens on the
interface of the tensors only, on a port that the kernel chose, which the others learn from the coordinator.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scpl_dist.transport import Store

# The control plane ends a wait, and the process, not a time-out of torch: an idle lane or a slow replica is no error.
FOREVER = timedelta(days=365)
_ABORT_S = 5.0
_over_nccl: list[Any] = []  # groups of the present meeting of the workers
_hanging_up: list[threading.Thread] = []


def nccl_group(ranks: Sequence[int]) -> Any:
    """A group over NCCL, which all workers have to make."""
    # Else torch's watchdog would end this process when another one has died.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    group = dist.new_group(list(ranks), backend="nccl", timeout=FOREVER)
    if group is not dist.GroupMember.NON_GROUP_MEMBER:
        _over_nccl.append(group)
    return group


def hang_up() -> None:
    """End all waits over NCCL, of this process and of its GPU, which a peer that is gone would never end.

    What they were to receive has no meaning then. At once for all groups, as each waits for the kernels of the others.
    """
    while _over_nccl:
        _hanging_up.append(threading.Thread(target=_hang_up, args=(_over_nccl.pop(),), daemon=True))
        _hanging_up[-1].start()


def _hang_up(group: Any) -> None:
    with suppress(RuntimeError):
        group.abort()


def leave() -> None:
    """Leave the process groups of torch.distributed, without a word to the others: who is gone cannot answer."""
    hang_up()
    while _hanging_up:
        _hanging_up.pop().join(_ABORT_S)
    if dist.is_initialized():
        dist.destroy_process_group()
    # torch names groups by their number, and has counted one that it could not make; newcomers have not.
    dist.distributed_c10d._world.group_count = 0


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
