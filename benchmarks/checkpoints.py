"""What a checkpoint every 20 steps costs: the same run with and without, in turn.

    python benchmarks/checkpoints.py --rounds 5

Time is taken between the first step after the 20th and the last step of the last stage, from ``metrics.jsonl``, so
start and end do not count and everything in between does. Prints the medians, the fastest rounds and the loss of
throughput by both; the aim is at most 2 %.

    python benchmarks/checkpoints.py --cpu

On a machine that is busy with other things wall time says nothing. This compares the processor time of a checkpoint,
of the training thread (the copy) and of the writer's thread, with that of the steps between two checkpoints. It is
the loss if no processor has a moment to spare; on others only the copy counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.storage.metrics_log import MetricsLog
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.worker.updater import Updater

SKIP = 20


def seconds_a_step(folder: Path, every: int, model: str, epochs: int, stages: int) -> tuple[float, int, int]:
    """One run: seconds a step, number of checkpoints and bytes of one."""
    run = folder / "run"
    settings = {"metrics.port": 0, "model.name": model, "run.epochs": epochs, "pipeline.stages": stages}
    settings |= {"checkpoint.every_steps": every, "checkpoint.best": "false"}
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    subprocess.run(command, check=True, capture_output=True)
    rows = MetricsLog(run / "metrics.jsonl").rows()
    times = {
        row["step"]: row["time"] for row in rows if row["event"] == "train" and row["stage"] == stages - 1
    }
    last = max(times)
    written = [row for row in rows if row["event"] == "checkpoint" and SKIP < row["step"] <= last]
    size = max(row["bytes"] for row in rows if row["event"] == "checkpoint")
    return (times[last] - times[SKIP]) / (last - SKIP), len(written), size


class Timed(CheckpointWriter):
    """A writer that notes the processor time of each checkpoint."""

    def __init__(self) -> None:
        super().__init__(lambda sequence, files, seconds: None, lambda error, step: None)
        self.seconds: list[float] = []

    def _write(self, sequence: int, step: int, folder: Path, states: Iterable[tuple[int, Any]]) -> None:
        begin = time.thread_time()
        super()._write(sequence, step, folder, states)
        self.seconds.append(time.thread_time() - begin)


def processor_time(every: int, model: str, stages: int, repeats: int = 15) -> None:
    """Print what a checkpoint costs each stage, in processor time."""
    torch.set_num_threads(1)
    settings = config.load(values={"model.name": model, "pipeline.stages": stages})
    source = data.resolve(settings)
    plan = Plan.plan(settings, source.classes, source.example())
    carry, labels = source.batch("train", 0, torch.arange(settings.data.batch_size))
    for place in plan.specs:
        trainables = plan.trainables(place.blocks)
        updaters = {index: Updater(trainable, settings) for index, trainable in trainables.items()}
        steps, copies = [], []
        for _ in range(repeats):
            begin, after = time.thread_time(), carry
            for index, trainable in trainables.items():
                before, after = after, trainable(after)
                torch.autograd.backward(list(trainable.losses(before, after, labels).values()))
                updaters[index].step({"lr": settings.optimizer.lr})
                after = after.detach()
            steps.append(time.thread_time() - begin)
        carry, writer = after, Timed()
        with tempfile.TemporaryDirectory() as folder:
            for number in range(repeats):
                begin = time.thread_time()
                state = {index: updater.state_dict() for index, updater in updaters.items()}
                writer.submit(number, number, Path(folder, str(number)), state)
                copies.append(time.thread_time() - begin)
                writer.drain()
        step, copy, write = map(statistics.median, (steps, copies, writer.seconds))
        times = f"a step {1000 * step:.1f} ms; a checkpoint {1000 * copy:.1f} ms for the copy"
        shares = f"{copy / (every * step):.2%} and {write / (every * step):.2%} of {every} steps"
        print(f"stage {place.stage}: {times} and {1000 * write:.1f} ms beside it: {shares}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--model", default="vgg_tiny")
    parser.add_argument("--cpu", action="store_true", help="compare processor time, for a busy machine")
    options = parser.parse_args()
    if options.cpu:
        processor_time(options.every, options.model, options.stages)
        return
    found: dict[int, list[float]] = {0: [], options.every: []}
    written = size = 0
    for number in range(options.rounds):
        for every in sorted(found, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory() as folder:
                seconds, count, size = seconds_a_step(
                    Path(folder), every, options.model, options.epochs, options.stages
                )
            found[every].append(seconds)
            written = count if every else written
    print(f"{options.model}, {options.stages} stages, {options.rounds} rounds")
    print(f"{written} checkpoints of {size:,} bytes in each run with them")
    for name, pick in (("median", statistics.median), ("fastest", min)):
        without, with_ = pick(found[0]), pick(found[options.every])
        print(
            f"{name:>8}: {1000 * without:.2f} ms a step without, {1000 * with_:.2f} ms with a checkpoint every "
            f"{options.every} steps: {1 - without / with_:+.1%} of the throughput lost"
        )


if __name__ == "__main__":
    main()
