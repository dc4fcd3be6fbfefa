"""What a training step has in memory at its peak, by method and depth of the model.

``python -m benchmarks.memory [--blocks 2,4,8,16] [--only NAME;...] [--batch 64] [--picture OUT.png]``: two steps of all
blocks in this process, by the executor of a run, with Adam; the first makes the optimizer's state, the second is
measured. The blocks are equal encoder layers (`benchmarks.networks.transformer`). What a step has is what torch's
allocator says to torch's profiler that it hands out and gets back, not the memory of the process. So other work on the
machine does not matter, and a line is the same wherever it is measured.

``--loss``: the supervised contrastive loss alone, its value and gradient, from 1024 to 32768 samples, in parts as it
is, and on the matrix of all pairs where that fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import settings
from scpl_dist import data
from scpl_dist.control.items import Item, Stop, Train
from scpl_dist.coordinator.item_sequence import split
from scpl_dist.data.loader import Loader
from scpl_dist.methods import losses
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.run.layout import Layout
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

PARTS = {"pipeline.micro_batches": 4}
RECOMPUTE = {"pipeline.recompute": True}
ALTERNATING = {"pipeline.schedule": "1f1b"}
METHODS: dict[str, dict[str, Any]] = {
    "scpl": {},
    "scpl, 4 parts": PARTS,
    "early_exit": {"run.method": "early_exit", "loss.classifier": "l"},
    "bp": {"run.method": "bp"},
    "bp, recomputation": {"run.method": "bp"} | RECOMPUTE,
    "gpipe, 4 parts": {"run.method": "gpipe"} | PARTS,
    "gpipe, 4 parts, 1f1b": {"run.method": "gpipe"} | PARTS | ALTERNATING,
    "gpipe, 4 parts, recomputation": {"run.method": "gpipe"} | PARTS | RECOMPUTE,
}
MIB = 2**20
PAIRS = losses.PAIRS
WIDTH = 256  # of what the loss compares in `measure_loss`


def measure(method: dict[str, Any], blocks: int, batch: int) -> dict[str, int]:
    """Bytes by kind.

    "weights" and the state of the "optimizer", both with those of the heads; the most of "gradients" that are there at
    once; the peak of a "step", which is activations, gradients and whatever else it has for a time; and "all", which is
    weights, states and the step.
    """
    values = settings("transformer", "token_data", batch, 1, layers=blocks) | {"pipeline.stages": 1}
    config = load(values=values | method)
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    device, alone = torch.device("cpu"), Layout([1])
    trainables = plan.trainables(range(blocks))
    updaters = {index: Updater(own, config) for index, own in trainables.items()}
    loader: Loader[Item] = Loader(source, config.run.seed, workers=0)
    unconnected = RpcTransport(rank=0, world=1, max_in_flight=1, device=device, generation="")
    executor = Executor(
        spec=StageSpec(0, 1, range(blocks)),
        method=plan.method,
        updaters=updaters,
        neighbours=Neighbours(unconnected, alone, alone.workers[0]),
        device=device,
        timer=PhaseTimer(),
        report=lambda done: None if done.sequence else profiler.start(),
        run_dir=Path(),
        loader=loader,
    )
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    parts = split(0, batch, config.pipeline.micro_batches)
    steps = [Train(sequence=k, step=k, epoch=0, schedule={"lr": 1e-3}, micro_batches=parts) for k in range(2)]
    feed(loader, [*steps, Stop(sequence=2)])
    parameters = [one for own in trainables.values() for one in own.parameters()]
    gradients = 0

    def count(one: nn.Parameter) -> None:
        nonlocal gradients
        gradients = max(gradients, sum(other.grad.nbytes for other in parameters if other.grad is not None))

    for one in parameters:
        one.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
    step = peak(executor.run, profiler)
    weights = sum(one.nbytes for one in parameters)
    states = sum(
        value.nbytes
        for updater in updaters.values()
        for optimizer in updater.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    )
    total = weights + states + step
    return {
        "weights": weights,
        "optimizer": states,
        "gradients": gradients,
        "step": step,
        "all": total,
    }


def peak(call: Callable[[], object], profiler: profile) -> int:
    """The most bytes that were alive at once of those that torch's allocator handed out while the profiler was on."""
    call()
    profiler.stop()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def table(names: Sequence[str], depths: Sequence[int], batch: int) -> dict[str, list[dict[str, int]]]:
    """Print a line for each method and depth as it is measured."""
    print(f"batch {batch}; MiB: weights + optimizer + peak of a step = all (the most of gradients at once)")
    found: dict[str, list[dict[str, int]]] = {name: [] for name in names}
    for name in names:
        for blocks in depths:
            found[name].append(kinds := measure(METHODS[name], blocks, batch))
            weights, states, gradients, step, total = (f"{count / MIB:.1f}" for count in kinds.values())
            text = f"{weights} + {states} + {step} = {total} ({gradients})"
            print(f"  {name:30} {blocks:3} blocks: {text}", flush=True)
    return found


def picture(found: dict[str, list[dict[str, int]]], depths: Sequence[int], out: Path) -> None:
    """The peak of a step and all, over the number of blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2),
        ("step", "all"),
        ("peak of a step", "with weights and optimizer"),
        strict=True,
    ):
        for name, peaks in found.items():
            style = "--" if "recomputation" in name else "-"
            axes.plot(
                depths, [kinds[kind] / MIB for kinds in peaks], style, marker="o", markersize=3, label=name
            )
        axes.set(title=title, xlabel="blocks", ylabel="MiB", xticks=depths, ylim=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(out, dpi=120)


def measure_loss(size: int, at_once: bool) -> int:
    """Bytes at the peak of value and gradient of the contrastive loss of so many samples, beyond their features."""
    losses.PAIRS = size**2 if at_once else PAIRS
    features, labels = torch.randn(size, WIDTH, requires_grad=True), torch.arange(size) % 10
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.start()
    return peak(lambda: torch.autograd.grad(losses.supcon(features, labels), features), profiler)


def loss_table() -> None:
    """Print a line for each number of samples."""
    print(f"MiB beyond the features (N, {WIDTH}): in parts / on the matrix of all pairs")
    for size in (1024, 2048, 4096, 8192, 16384, 32768):
        whole = f"{measure_loss(size, True) / MIB:.0f}" if size <= 8192 else "not tried"
        print(f"  N = {size:5}: {measure_loss(size, False) / MIB:.0f} / {whole}", flush=True)


def main() -> None:
    """Print the table, or that of the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="2,4,8,16")
    parser.add_argument("--only", help="names of methods, separated by semicolons")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--loss", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.loss:
        loss_table()
        return
    names = arguments.only.split(";") if arguments.only else list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: use {'; '.join(METHODS)}")
    depths = [int(text) for text in arguments.blocks.split(",")]
    found = table(names, depths, arguments.batch)
    if arguments.picture:
        picture(found, depths, arguments.picture)


if __name__ == "__main__":
    main()
