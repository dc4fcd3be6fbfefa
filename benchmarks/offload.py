"""What ``runtime.offload = "disk"`` costs: seconds of a step with all blocks in memory, and with two of them.

``python -m benchmarks.offload [--batches 4,16,64] [--blocks 8] [--rounds 5] [--folder DIR]``: the blocks are equal
encoder layers (`benchmarks.networks.transformer`) in this process, trained by the executor of a run with Adam. What
moves in a step is the same for every batch. The two ways take turns; a figure is the median of the rounds, with the
fewest and the most. Files that fit into the kernel's page cache never wait for the disk, so this shows what copies and
system calls cost; with ``--cold`` the disk, too: each file is written to it and dropped from the cache at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.contenders import settings
from scpl_dist import data
from scpl_dist.control.items import Item, Stop, Train
from scpl_dist.data.loader import Loader
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.run.layout import Layout
from scpl_dist.run.phases import Phase
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker.allocator import keep_freed_memory, return_freed_memory
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.offload import Disk, Offload
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

STEPS = 3  # of a round
CPU = torch.device("cpu")


class Cold(Disk):
    """A disk whose files the kernel does not keep in memory."""

    def write(self, block: int, parts: list[Tensor]) -> None:
        """The bytes of a block, which are on the disk when it returns."""
        super().write(block, parts)
        number = self.files[block].fileno()
        os.fdatasync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


class Trained:
    """A stage of all blocks, which stay in memory or are in the `place`."""

    def __init__(self, batch: int, blocks: int, place: Disk | None) -> None:
        values: dict[str, Any] = settings("transformer", "token_data", batch, 1, layers=blocks)
        config = load(values=values | {"pipeline.stages": 1})
        source = data.resolve(config)
        plan = Plan.plan(config, source.classes, source.example())
        self.offload = None if place is None else Offload(place, CPU)
        updaters = {}
        for block in range(blocks):
            updaters[block] = Updater(plan.trainables([block])[block], config)
            if self.offload is not None:
                self.offload.add(block, updaters[block])
                self.offload.put(block, wait=True)
        self.loader: Loader[Item] = Loader(source, config.run.seed, workers=0)
        self.timer = PhaseTimer()
        alone = Layout([1])
        unconnected = RpcTransport(rank=0, world=1, max_in_flight=1, device=CPU, generation="")
        self.executor = Executor(
            spec=StageSpec(0, 1, range(blocks)),
            method=plan.method,
            updaters=updaters,
            neighbours=Neighbours(unconnected, alone, alone.workers[0]),
            device=CPU,
            timer=self.timer,
            report=lambda done: None,
            run_dir=Path(),
            loader=self.loader,
            offload=self.offload,
        )
        self._batch = batch
        self.bytes = 0
        self.round()  # the first step makes the states of the optimizers
        if self.offload is not None:
            self.bytes = 2 * sum(size for parts in self.offload.stored.values() for _, size in parts)

    def round(self) -> tuple[float, float]:
        """Seconds of a step, and how many of them the training thread waited for a block."""
        parts, schedule = ((0, self._batch),), {"lr": 1e-3}
        items = [
            Train(sequence=k, step=k, epoch=0, schedule=schedule, micro_batches=parts) for k in range(STEPS)
        ]
        feed(self.loader, [*items, Stop(sequence=STEPS)])
        before, start = self._waited(), time.perf_counter()
        self.executor.run()
        return (time.perf_counter() - start) / STEPS, (self._waited() - before) / STEPS

    def _waited(self) -> float:
        return self.timer.stats(queue=0).phases.get(Phase.OFFLOAD, 0.0)


def main() -> None:
    """Print a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="4,16,64")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine.described()}, {given.rounds} rounds of {STEPS} steps, {given.blocks} blocks", flush=True)
    for batch in map(int, given.batches.split(",")):
        place = (Cold if given.cold else Disk)(given.folder)
        ways = {"off": Trained(batch, given.blocks, None), "disk": Trained(batch, given.blocks, place)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                (return_freed_memory if name == "disk" else keep_freed_memory)()  # as a worker does
                found[name].append(way.round())
        texts = []
        for name, rounds in found.items():
            steps = [1000 * step for step, _ in rounds]
            texts.append(f"{name} {statistics.median(steps):.0f} ({min(steps):.0f} to {max(steps):.0f}) ms")
        waited = 1000 * statistics.median(wait for _, wait in found["disk"])
        ratio = statistics.median(step for step, _ in found["disk"]) / statistics.median(
            step for step, _ in found["off"]
        )
        offload = ways["disk"].offload
        assert offload is not None
        print(
            f"  batch {batch:4}: {', '.join(texts)}, {ratio:.2f} times, {waited:.0f} ms of it waiting; "
            f"{ways['disk'].bytes / 2**20:.0f} MiB moved a step",
            flush=True,
        )
        offload.close()


if __name__ == "__main__":
    main()
