"""Bytes and samples per second over a slow link: SCPL on each transport against torch's ScheduleGPipe on gloo.

Two hosts are made of network namespaces (root is needed); tc's token bucket limits what each may send. Bytes are those
of the interface, both ways: tensors, labels, control plane, rendezvous and the headers of TCP.

    python -m benchmarks.network            1 Gbit/s and 100 Mbit/s
    python -m benchmarks.network 10         another rate, in Mbit/s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from scpl_dist.run.config import load

WIDTH = 1024
BATCH = 512
STEPS = 60
WARM_UP = 6
MICRO_BATCHES = 4
CLASSES = 10


class Layer(nn.Sequential):
    """A block of the two-stage network; what it sends is BATCH x WIDTH x 4 bytes, 2 MiB."""

    projector_widths = (64, 64)

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def layers(classes: int) -> list[Callable[[], nn.Module]]:
    """Two blocks."""
    return [Layer, Layer]


def vectors(root: str) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Random vectors for `STEPS` steps, and next to nothing to evaluate."""
    size = BATCH * STEPS
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, WIDTH, generator=generator).repeat(size // 1024 + 1, 1)[:size]
    labels = torch.arange(size) % CLASSES
    few = TensorDataset(inputs[:CLASSES], labels[:CLASSES])
    return TensorDataset(inputs, labels), few, few


@dataclass
class Figures:
    """Of one contender: MB a step over the link both ways, and samples per second in steady state."""

    megabytes: float
    samples: float


def gpipe() -> None:
    """One rank of torch's GPipe; prints samples per second."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = nn.Sequential(Layer(), nn.Linear(WIDTH, CLASSES)) if rank else Layer()
    optimizer = torch.optim.Adam(part.parameters(), fused=True)
    rows = BATCH // MICRO_BATCHES
    entering = torch.randn(rows, WIDTH, requires_grad=rank > 0)
    device = torch.device("cpu")
    stage = PipelineStage(part, rank, 2, device, input_args=(entering,), output_args=(part(entering),))
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy)
    inputs, labels = vectors("")[0].tensors
    begin = 0.0
    for step in range(STEPS):
        if step == WARM_UP:
            begin = time.perf_counter()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs[batch])
        else:
            schedule.step(target=labels[batch], losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        print(f"SAMPLES {(STEPS - WARM_UP) * BATCH / (time.perf_counter() - begin)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(rate: int, transport: str, wire_dtype: str) -> Figures:
    """Two hosts with a link of `rate` Mbit/s; transport "gpipe" is torch's own pipeline."""
    from tests.support.hosts import cluster, ip

    with cluster(2) as hosts, tempfile.TemporaryDirectory() as folder:
        for host in hosts:
            shape = ["root", "tbf", "rate", f"{rate}mbit", "burst", "256kb", "latency", "50ms"]
            command = ["ip", "netns", "exec", host.namespace, "tc", "qdisc", "add", "dev", "eth0", *shape]
            subprocess.run(command, check=True)
        run = Path(folder, "run")
        settings = {
            "model.name": "benchmarks.network:layers",
            "data.name": "benchmarks.network:vectors",
            "data.batch_size": BATCH,
            "data.augmentation": "none",
            "run.epochs": 1,
            "metrics.port": 0,
            "control.host": "host-a",
            "control.insecure": True,
            "pipeline.transport": "rpc" if transport == "gpipe" else transport,
            "pipeline.wire_dtype": wire_dtype,
        }
        config = Path(folder, "config.toml")
        config.write_text(load(values=settings).to_toml())
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        if transport == "gpipe":
            target: list[object] = ["benchmarks.network", "gpipe"]
        else:
            target = ["scpl_dist", "worker", config, "--run-dir", run]
        processes = []
        for rank, host in enumerate(hosts):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            command += ["--nproc-per-node=1", "--master-addr=host-a", "--master-port=29500", "-m"]
            processes.append(host.start(*command, *target, env=environment))
        codes = [process.wait(600) for process in processes]
        if any(codes):
            raise SystemExit("\n".join(process.output for process in processes))
        link = json.loads(ip("-n", hosts[0].namespace, "-j", "-s", "link", "show", "eth0"))[0]["stats64"]
        total = link["rx"]["bytes"] + link["tx"]["bytes"]
        if transport == "gpipe":
            samples = float(processes[0].output.split("SAMPLES ")[1].split()[0])
        else:
            samples = json.loads((run / "result.json").read_text())["samples_per_second"]
        return Figures(total / STEPS / 1e6, samples)


def main() -> None:
    """Measure all contenders at each rate."""
    if sys.argv[1:] == ["gpipe"]:
        gpipe()
        return
    contenders = [("gpipe", "float32")]
    contenders += [(transport, dtype) for transport in ("rpc", "gloo") for dtype in ("float32", "bfloat16")]
    load_before = os.getloadavg()[0]
    print(
        f"{STEPS} steps of {BATCH} samples, activations of {BATCH * WIDTH * 4 / 1e6:.2f} MB; load {load_before:.1f}"
    )
    for rate in map(int, sys.argv[1:] or ["1000", "100"]):
        print(f"\n{rate} Mbit/s          MB a step   of GPipe   samples/s   x GPipe")
        base: Figures | None = None
        for transport, dtype in contenders:
            found = measure(rate, transport, dtype)
            base = base or found
            print(
                f"{transport:6} {dtype:10} {found.megabytes:10.3f} {found.megabytes / base.megabytes:10.3f} "
                f"{found.samples:11.0f} {found.samples / base.samples:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
