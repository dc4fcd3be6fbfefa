"""Hosts far away from each other: SCPL beside torch's GPipe and 1F1B over slow links and long ways.

    python -m benchmarks.wan                  2 hosts: 1000, 100 and 20 Mbit/s, each 0, 10, 50 and 200 ms away
    python -m benchmarks.wan --hosts 4 --rates 100 --delays 0,100
    python -m benchmarks.wan --rates 20 --delays 10 --theirs "" --ours "scpl gloo float32 2,scpl gloo int8 2"

Hosts are network namespaces (root is needed), and a switch of this project's between them (`benchmarks.link`) passes
frames on late: so many milliseconds one way, so many Mbit/s a host and direction. All have the same blocks, batch and
Adam; torch's schedules take turns with several numbers of micro-batches. Bytes are those of all interfaces: tensors,
labels, control plane, rendezvous and headers. Samples are those per second while all hosts train. Busy: the share of
the time in which a stage does not wait, of torch's its processor time; more hosts than cores share these.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import contenders
from scpl_dist.run.config import load
from tests.support.hosts import Host, cluster, ip

WIDTH = 1024
BATCH = 128
LAYERS = 4
TIMED = 30  # steps, or four times those that may be on their way
WARM_UP = 10  # steps, or those that may be on their way: they are sent before anybody waits for room
CLASSES = 10


class Block(nn.Sequential):
    """The block of a host; what it sends is BATCH x WIDTH x 4 bytes, half a MiB, for some 100 ms of one core."""

    projector_widths = (64, 64)

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)))


def blocks(classes: int, hosts: int) -> list[Callable[[], nn.Module]]:
    """One for each host."""
    return [Block] * hosts


def vectors(root: str, steps: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Random vectors for so many steps, and next to nothing to evaluate."""
    size = BATCH * steps
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, WIDTH, generator=generator).repeat(size // 1024 + 1, 1)[:size]
    labels = torch.arange(size) % CLASSES
    few = TensorDataset(inputs[:CLASSES], labels[:CLASSES])
    return TensorDataset(inputs, labels), few, few


@dataclass
class Figures:
    """Of one contender: MB a step over all links, samples a second while all train, mean busy share of a host."""

    megabytes: float
    samples: float
    busy: float


def peer(schedule: str, micro_batches: int) -> None:
    """One rank of one of torch's pipelines; prints a line of samples a second and the busy share."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, schedules

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    last = rank == world - 1
    part = nn.Sequential(Block(), nn.Linear(WIDTH, CLASSES)) if last else Block()
    optimizer = torch.optim.Adam(part.parameters(), fused=True)
    entering = torch.randn(BATCH // micro_batches, WIDTH, requires_grad=rank > 0)
    device = torch.device("cpu")
    stage = PipelineStage(part, rank, world, device, input_args=(entering,), output_args=(part(entering),))
    pipeline = schedules.get_schedule_class(schedule)(
        stage, micro_batches, loss_fn=nn.functional.cross_entropy
    )
    steps = WARM_UP + TIMED
    inputs, labels = vectors("", steps)[0].tensors
    begin, used = 0.0, 0.0
    for step in range(steps):
        if step == WARM_UP:
            begin, used = time.perf_counter(), time.process_time()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        losses: list[Tensor] = []
        pipeline.step(
            *([inputs[batch]] if rank == 0 else []),
            **({"target": labels[batch], "losses": losses} if last else {}),
        )
        optimizer.step()
        optimizer.zero_grad()
    taken = time.perf_counter() - begin
    print(f"FIGURES {TIMED * BATCH / taken} {(time.process_time() - used) / taken}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def far(hosts: list[Host], delay_ms: float, mbits: float) -> Iterator[None]:
    """Hosts that are so far from each other, in place of the switch that joins them."""
    switch = hosts[0].switch
    for host in hosts:
        ip("-n", switch, "link", "set", host.port, "nomaster")
    command = [
        "ip",
        "netns",
        "exec",
        switch,
        sys.executable,
        "-m",
        "benchmarks.link",
        str(delay_ms),
        str(mbits),
    ]
    link = subprocess.Popen([*command, *(host.port for host in hosts)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        link.communicate(timeout=10)


def travelled(hosts: list[Host]) -> int:
    """Bytes that all hosts have sent."""
    rows = [json.loads(ip("-n", host.namespace, "-j", "-s", "link", "show", "eth0"))[0] for host in hosts]
    return sum(int(row["stats64"]["tx"]["bytes"]) for row in rows)


def measure(count: int, delay_ms: float, mbits: float, name: str) -> Figures:
    """A contender: "scpl TRANSPORT WIRE_DTYPE MAX_IN_FLIGHT", or "SCHEDULE MICRO_BATCHES" of torch's."""
    kind, *options = name.split()
    with cluster(count) as hosts, far(hosts, delay_ms, mbits), tempfile.TemporaryDirectory() as folder:
        run, warm_up, steps = Path(folder, "run"), WARM_UP, WARM_UP + TIMED
        target: list[object] = ["benchmarks.wan", "--peer", kind, *options]
        if kind == "scpl":
            transport, wire, in_flight = options
            lead = contenders.lead(count, int(in_flight))
            warm_up = max(WARM_UP, lead)
            steps = warm_up + max(TIMED, 4 * lead) + lead
            settings = {
                "model.name": "benchmarks.wan:blocks",
                "model.args": {"hosts": count},
                "data.name": "benchmarks.wan:vectors",
                "data.args": {"steps": steps},
                "data.batch_size": BATCH,
                "data.augmentation": "none",
                "run.epochs": 1,
                "metrics.port": 0,
                "control.host": "host-a",
                "control.insecure": True,
                "pipeline.stages": count,
                "pipeline.transport": transport,
                "pipeline.wire_dtype": wire,
                "pipeline.max_in_flight": int(in_flight),
            }
            config = Path(folder, "config.toml")
            config.write_text(load(values=settings).to_toml())
            target = ["scpl_dist", "worker", config, "--run-dir", run]
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        processes = []
        for rank, host in enumerate(hosts):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nnodes={count}",
                f"--node-rank={rank}",
            ]
            command += ["--nproc-per-node=1", "--master-addr=host-a", "--master-port=29500", "-m"]
            processes.append(host.start(*command, *target, env=environment))
        codes = [process.wait(900) for process in processes]
        if any(codes):
            raise SystemExit("\n".join(process.output for process in processes))
        megabytes = travelled(hosts) / steps / 1e6
        if kind != "scpl":
            found = [process.output.split("FIGURES ")[1].split()[:2] for process in processes]
            busy = sum(float(used) for _, used in found) / count
            return Figures(megabytes, min(float(samples) for samples, _ in found), busy)
        samples = BATCH / contenders.seconds_a_step(run, warm_up)
        result = json.loads((run / "result.json").read_text())
        return Figures(megabytes, samples, statistics.mean(map(_busy, result["per_stage"])))


def _busy(stage: dict[str, float]) -> float:
    busy = stage["busy_seconds"]
    return busy / (busy + stage["waiting_seconds"] + stage["blocked_seconds"])


def main() -> None:
    """A table for each number of hosts and rate, a line for each contender and delay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", default="2")
    parser.add_argument("--rates", default="1000,100,20")
    parser.add_argument("--delays", default="0,10,50,200")
    parser.add_argument("--ours", default="scpl rpc float32 2,scpl gloo float32 2,scpl gloo float32 16")
    parser.add_argument("--theirs", default="GPipe,1F1B")
    parser.add_argument("--micro-batches", default="1,2,4,8,16", help="that theirs are tried with")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.peer[0], int(given.peer[1]))
        return
    load_before = os.getloadavg()[0]
    print(f"steps of {BATCH} samples, {BATCH * WIDTH * 4 / 1e6:.2f} MB to send; load {load_before:.1f}")
    for count in map(int, given.hosts.split(",")):
        theirs = [
            f"{schedule} {parts}"
            for schedule in filter(None, given.theirs.split(","))
            for parts in map(int, given.micro_batches.split(","))
            if schedule != "1F1B" or parts >= count  # which it needs
        ]
        for mbits in map(float, given.rates.split(",")):
            print(
                f"\n{count} hosts, {mbits:g} Mbit/s\n| delay | | MB a step | samples/s | busy |\n|---|---|---|---|---|"
            )
            for delay in map(float, given.delays.split(",")):
                for name in [*given.ours.split(","), *theirs]:
                    one = measure(count, delay, mbits, name)
                    figures = f"{one.megabytes:.2f} | {one.samples:.0f} | {100 * one.busy:.0f} %"
                    print(f"| {delay:g} ms | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
