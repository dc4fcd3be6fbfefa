"""What do precision, memory format and compilation bring?

``python -m benchmarks.precision [--rounds 5] [--no-compile]``: a training step of all blocks in this process, one
thread, by the blocks and updaters of a run (the method scpl). Each way has its turn in every round; medians over the
rounds, and ratios to float32. Seconds are of the processor, which other work on the machine disturbs least. What
workers do with freed memory (``runtime.keep_memory``) holds for all ways.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from scpl_dist.methods.block import TrainableBlock, detached
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.worker.allocator import keep_freed_memory
from scpl_dist.worker.updater import Updater

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"runtime.precision": "bfloat16"},
    "channels_last": {"runtime.memory_format": "channels_last"},
    "both": {"runtime.precision": "bfloat16", "runtime.memory_format": "channels_last"},
    "compile": {"runtime.compile": True},
}
NETWORKS = {"cnn": (64, 64, 16, 16), "transformer": (64, 32, 256)}
"""Inputs of a batch, for each function of `benchmarks.networks`."""


def made(network: str, example: Tensor, settings: dict[str, Any]) -> list[Updater]:
    """The blocks of a network that compute one way."""
    name = {"model.name": f"benchmarks.networks:{network}", "runtime.device": "cpu", "pipeline.stages": 1}
    config = load(values=name | settings)
    plan = Plan.plan(config, 10, example[:2].to("meta"))
    return [Updater(own, config) for own in plan.trainables(range(len(plan.parameters))).values()]


def seconds(updaters: list[Updater], x: Tensor, labels: Tensor) -> float:
    """One step of all blocks, in seconds of the processor."""
    begin = time.process_time()
    carry: Any = x
    for updater in updaters:
        own: TrainableBlock = updater.trainable
        after = own(carry)
        updater.backward(torch.stack(list(own.losses(carry, after, labels).values())).sum())
        updater.step({"lr": 1e-3})
        carry = detached(after)
    return time.process_time() - begin


def main() -> None:
    """Print a line for each network and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = "kept" if keep_freed_memory() else "given back"
    print(f"{machine.described()}, memory {kept}")
    for network, shape in NETWORKS.items():
        torch.manual_seed(0)
        x, labels = torch.randn(shape), torch.arange(shape[0]) % 10
        image, skipped = len(shape) == 4, given.no_compile
        ways = {
            way: made(network, x, settings)
            for way, settings in WAYS.items()
            if (image or "runtime.memory_format" not in settings) and not (skipped and way == "compile")
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(given.rounds + 2):  # the first ones allocate and compile
            for way, updaters in ways.items():
                duration = seconds(updaters, x, labels)
                if number > 1:
                    taken[way].append(duration)
        usual = statistics.median(taken["float32"])
        for way, times in taken.items():
            median = statistics.median(times)
            spread = f"{1000 * min(times):.0f} to {1000 * max(times):.0f}"
            print(
                f"{network:12} {way:14} {1000 * median:6.0f} ms ({spread}), {usual / median:.2f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
