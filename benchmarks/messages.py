"""What does a message between two workers of a host cost, over each transport, against a copy of its bytes?

    python -m benchmarks.messages --megabytes 4 64 --rounds 7

Two processes with the ends of one lane, as in a run; the sender posts as fast as it has credit. Medians over the rounds
of what a message takes, in milliseconds of the clock, and of processor time in both processes together. The first
round, which connects and allocates, does not count. What `rpc` can be told is taken in its ways: `uv` is sockets and
`shm` memory that both map, which polls; bytes of large tensors go by a channel: `cma`, where the receiver's kernel
copies them out of the sender, `mpt_uv`, over several sockets, or `basic`, in the transport itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine
from scpl_dist.transport import Envelope, Transport, rpc
from scpl_dist.transport.c10d import C10dTransport
from scpl_dist.worker.allocator import keep_freed_memory

CPU = torch.device("cpu")
WAYS: dict[str, tuple[list[str], list[str]] | None] = {
    "gloo": None,
    "rpc uv cma": (["uv"], ["cma"]),
    "rpc uv mpt_uv": (["uv"], ["mpt_uv"]),
    "rpc uv basic": (["uv"], ["basic"]),
    "rpc shm cma": (["shm", "uv"], ["cma"]),
    "rpc shm basic": (["shm", "uv"], ["basic"]),
}
"""TensorPipe's transports and channels, for rpc."""


def connected(way: str, rank: int, port: int) -> Transport:
    """One end of the lane."""
    common: dict[str, Any] = {"rank": rank, "world": 2, "max_in_flight": 2, "device": CPU}
    ways = WAYS[way]
    transport: Transport
    if ways is None:
        transport = C10dTransport(backend="gloo", links=[(0, 1)], **common)
    else:
        rpc.TRANSPORTS, rpc.CHANNELS = ways
        transport = rpc.RpcTransport(generation="1", devices=[CPU] * 2, **common)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)  # type: ignore[attr-defined]
    transport.connect(store)
    return transport


def work(
    rank: int, port: int, way: str, floats: int, messages: int, rounds: int, results: Any, end: Any
) -> None:
    """Be one of the two: 0 sends, and 1 takes and answers once a round."""
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    keep_freed_memory()
    transport = connected(way, rank, port)
    tensor, taken = torch.ones(floats), []
    for _ in range(rounds + 1):
        begin, used = time.perf_counter(), time.process_time()
        for number in range(messages):
            if rank == 0:
                transport.wait_for_room(1)
                transport.post(1, Envelope({"sequence": number}, 0, tensor))
            else:
                transport.receive(0)
        if rank == 0:
            transport.receive(1)
        else:
            transport.post(0, Envelope({"sequence": messages}))
        taken.append((time.perf_counter() - begin, time.process_time() - used))
    results.put((rank, taken[1:]))
    results.close()
    results.join_thread()
    end.wait(120)  # the last answer may still be on its way
    os._exit(0)  # threads of the transport may wait for ever


def measured(way: str, floats: int, messages: int, rounds: int) -> tuple[list[float], float]:
    """Milliseconds of a message: of the clock by round, and of processors, the median of the rounds."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    results = context.Queue()
    arguments = (port, way, floats, messages, rounds, results, context.Barrier(2))
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(10)
        process.kill()
    clock = [1e3 * seconds / messages for seconds, _ in found[0]]
    processor = [1e3 * (one[1] + other[1]) / messages for one, other in zip(found[0], found[1], strict=True)]
    return clock, statistics.median(processor)


def copied(floats: int, messages: int, rounds: int) -> list[float]:
    """Milliseconds of the clock for a copy of the bytes within one process, by round."""
    tensor, taken = torch.ones(floats), []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(messages):
            tensor.clone()
        taken.append(1e3 * (time.perf_counter() - begin) / messages)
    return taken[1:]


def main() -> None:
    """Print a line for each size and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.01, 4, 64])
    parser.add_argument("--messages", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(machine.described())
    for megabytes in given.megabytes:
        floats = int(megabytes * 1e6 / 4)
        clock = copied(floats, given.messages, given.rounds)
        _show(megabytes, "copy", clock, statistics.median(clock))
        for way in given.ways:
            _show(megabytes, way, *measured(way, floats, given.messages, given.rounds))


def _show(megabytes: float, way: str, clock: list[float], processor: float) -> None:
    spread = f"{min(clock):.2f} to {max(clock):.2f}"
    print(
        f"{megabytes:g} MB {way:14} {statistics.median(clock):7.2f} ms ({spread}), processors {processor:.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
