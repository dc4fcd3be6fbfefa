"""How long each block takes: the measure behind ``pipeline.partition = "measured"`` and ``scpl-dist plan``.

It is taken once, by the process that starts the run, which writes the block counts into the run's configuration. Two
processes that measured for themselves would not come to the same stages.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from scpl_dist.control.items import Item, Stop, Train
from scpl_dist.data import DataSource
from scpl_dist.data.loader import Loader
from scpl_dist.methods import arithmetic
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run import partition
from scpl_dist.run.layout import Layout
from scpl_dist.run.phases import Phase
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

REPEATS = 3  # steps after the first, which allocates


def counts(plan: Plan, source: DataSource) -> list[int]:
    """Blocks of each stage such that the slowest stage, its replicas considered, is as fast as possible."""
    stages = plan.config.pipeline.stages
    if stages in (1, len(plan.parameters)):
        return partition.balanced([1.0] * len(plan.parameters), stages)
    return partition.balanced(measure(plan, source), stages, plan.config.layout.replicas)


def measure(plan: Plan, source: DataSource) -> list[float]:
    """Seconds of one training step of each block (forward, loss, backward, update), the shortest of a few.

    All blocks are trained on the first batch as one stage, by the executor that a worker has.
    """
    config = plan.config
    device = arithmetic.device(config.at(0))
    blocks = range(len(plan.parameters))
    loader: Loader[Item] = Loader(source, config.run.seed, workers=0)
    size, schedule = min(config.data.batch_size, source.sizes["train"]), {"lr": config.optimizer.lr}
    for number in range(REPEATS + 1):
        feed(loader, [Train(sequence=number, step=0, epoch=0, schedule=schedule, micro_batches=((0, size),))])
    feed(loader, [Stop(sequence=REPEATS + 1)])
    timer = SynchronousTimer(device)
    passed: list[dict[int, float]] = [{}]  # seconds of each block until the end of each item, the stop too
    alone = Layout([1])
    unconnected = RpcTransport(rank=0, world=1, max_in_flight=1, device=device, generation="")
    executor = Executor(
        spec=StageSpec(0, 1, blocks),
        method=plan.method,
        updaters={block: Updater(own.to(device), config) for block, own in plan.trainables(blocks).items()},
        neighbours=Neighbours(unconnected, alone, alone.workers[0]),
        device=device,
        timer=timer,
        report=lambda done: passed.append(timer.block_seconds()),
        run_dir=Path(),
        loader=loader,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.runtime.threads)
    try:
        executor.run()
    finally:
        torch.set_num_threads(threads)
    return [
        min(after[block] - before.get(block, 0.0) for before, after in itertools.pairwise(passed[:-1]))
        for block in blocks
    ]


class SynchronousTimer(PhaseTimer):
    """A timer that lets a GPU finish a phase before the next one begins."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def enter(self, phase: Phase) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        super().enter(phase)
