"""Which transport a run takes, decided alike by all workers from what all know of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scpl_dist.run.config import Config
from scpl_dist.run.errors import SetupError
from scpl_dist.transport import Transport


def choose(wanted: str, endpoints: Sequence[Mapping[str, Any]]) -> str:
    """Its name: "auto" takes nccl if every worker has a GPU of its own, which "nccl" demands, and rpc otherwise."""
    if wanted not in ("auto", "nccl"):
        return wanted
    if not all(endpoint["device"].startswith("cuda") for endpoint in endpoints):
        problem = "not every worker is on a GPU"
    elif not apart(endpoints):
        problem = "some workers share a GPU, which NCCL does not support"
    else:
        return "nccl"
    if wanted == "nccl":
        raise SetupError(f'pipeline.transport = "nccl": {problem}; use "auto", "rpc" or "gloo"')
    return "rpc"


def apart(endpoints: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each worker has a GPU of its own.

    Its number does not tell: each process may be shown another part of the GPUs, and a container has a host's name of
    its own.
    """
    gpus = [endpoint["gpu"] for endpoint in endpoints if endpoint["gpu"]]
    return len(set(gpus)) == len(endpoints)


def connectable(
    config: Config,
    rank: int,
    generation: str,
    group: int,
    device: torch.device,
    endpoints: Sequence[Mapping[str, Any]],
) -> Transport:
    """The transport of a worker, not yet connected."""
    name = choose(config.pipeline.transport, endpoints)
    common: dict[str, Any] = {
        "rank": rank,
        "world": len(endpoints),
        "max_in_flight": config.pipeline.max_in_flight,
        "device": device,
        "timeout_s": config.runtime.first_step_timeout_s,  # some workers may still be building
        "wire_dtype": getattr(torch, config.pipeline.wire_dtype),
    }
    if name == "rpc":
        from scpl_dist.transport.rpc import RpcTransport

        devices = [torch.device(endpoint["device"]) for endpoint in endpoints]
        return RpcTransport(generation=generation, group=group, devices=devices, **common)
    from scpl_dist.transport.c10d import C10dTransport

    return C10dTransport(backend=name, links=config.layout.links(), **common)
