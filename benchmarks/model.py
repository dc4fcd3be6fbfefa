"""What a pipeline of many stages would do: the time of an item by what it costs, beside what stages that wait do.

    python -m benchmarks.model --block 50 --megabytes 4 --link 1.25
    python -m benchmarks.model --block 5 --megabytes 4 --link 12.5 --ahead
    python -m benchmarks.model --block 50 --cores 2 --measure

An item takes as long as the dearest of what goes on at the same time: the slowest stage with the work around its
blocks, the message on its link, and the coordinator, who hears of it from every stage. Where stages share processors
the work around the blocks is stretched by the part of them that is taken, and the first item passes all stages alone.
What it leaves out: hiccups, of which a stage with neighbours on both sides feels those of all.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from benchmarks import contenders, machine

STAGES = (2, 4, 8, 16, 32, 64)
MEASURED = (2, 4, 8, 16)
STEPS = 60
WORKER, COORDINATOR = 2.5, 0.08
"""Milliseconds on two x86-64 cores by `benchmarks.overhead`: a worker's process, a busy coordinator for a stage."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Milliseconds of an item, or what makes them."""

    block: float  # of the slowest stage's blocks, on a device that computes nothing else
    worker: float  # processor time of a worker beside its blocks
    coordinator: float  # processor time of the coordinator for a stage
    megabytes: float  # of a message between two stages
    link: float  # gigabytes a second between two stages
    cores: int  # that all processes share; 0 is that no stage takes a processor from another
    ahead: bool  # whether the worker prepares an item while its device computes the one before, as with a GPU

    def item(self, stages: int) -> float:
        """Between two items in the middle of a run."""
        return max(self._stage(stages), self.megabytes / self.link, stages * self.coordinator)

    def share(self, stages: int, items: int) -> float:
        """Of the throughput of stages that cost nothing but their blocks, with filling and draining."""
        return items * self.block / ((items + stages - 1) * self.item(stages))

    def bound(self, stages: int) -> str:
        """What an item waits for."""
        item = self.item(stages)
        if item == stages * self.coordinator:
            return "coordinator"
        return "link" if item == self.megabytes / self.link else "stage"

    def _stage(self, stages: int) -> float:
        """The time t with ``t = block + worker / (1 - taken / t)``: who shares processors gets what is not taken."""
        if self.ahead:
            return max(self.block, self.worker)
        taken = stages * (self.worker + self.coordinator) / self.cores if self.cores else 0.0
        half = (taken + self.block + self.worker) / 2
        return half + math.sqrt(half * half - taken * self.block)


def main() -> None:
    """Print the table, or the prediction beside the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--block", type=float, default=50.0, help="ms of the slowest stage's blocks")
    parser.add_argument("--worker", type=float, default=WORKER, help="ms of benchmarks.overhead worker")
    parser.add_argument(
        "--coordinator", type=float, default=COORDINATOR, help="ms of benchmarks.overhead coordinator"
    )
    parser.add_argument("--megabytes", type=float, default=4.0, help="of a message")
    parser.add_argument("--link", type=float, default=1.25, help="gigabytes a second")
    parser.add_argument("--cores", type=int, default=0, help="shared by all processes; 0: each has its own")
    parser.add_argument(
        "--ahead", action="store_true", help="the device computes behind the worker, as a GPU does"
    )
    parser.add_argument("--items", type=int, default=1000, help="of a run, for filling and draining")
    parser.add_argument("--measure", action="store_true", help="run stages that wait, and print both")
    options = vars(parser.parse_args())
    items, measure = options.pop("items"), options.pop("measure")
    costs = Costs(**options)
    print(machine.described() if measure else costs)
    for stages in MEASURED if measure else STAGES:
        item = costs.item(stages)
        text = f"{stages:3} stages: {item:.2f} ms an item, {costs.block / item:.3f} of the ideal"
        if measure:
            found = 1e3 * contenders.waiting(stages, costs.block / 1e3, STEPS).seconds
            text += f"; measured {found:.2f} ms, {costs.block / found:.3f}"
        else:
            text += f", {costs.share(stages, items):.3f} with filling and draining; waits for: {costs.bound(stages)}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
