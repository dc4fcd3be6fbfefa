"""What does the runtime itself cost?

    python -m benchmarks.speed [--rounds 3] [--only ceiling,delays,replicas,start]

One thread a worker, on this machine; ratios are of medians over the rounds. Random data, no augmentation. Run it on an
idle machine. `benchmarks.peers` measures the stream beside other ways to train.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import contenders, machine
from benchmarks.peers import MODELS
from scpl_dist.storage.metrics_log import MetricsLog

DELAYS = [(16, 0.05, 60, 0.99), (8, 0.02, 150, 0.95)]
"""Stages, seconds of a stage's work, steps, aim."""


def ceiling() -> None:
    """Print what two independent processes reach on this machine: no pipeline of two stages can be faster."""
    for model in ("cnn", "transformer"):
        alone = contenders.plain_scpl(MODELS[model]).seconds
        both = contenders.two_at_once(MODELS[model]).seconds
        print(
            f"  {2 * alone / both:.3f}  two independent processes of {model} at once against one", flush=True
        )


def delays(rounds: int) -> None:
    """Print the throughput of stages that only wait, against the wait alone; and that of a plain loop of one block."""
    for stages, seconds, steps, aim in DELAYS:
        ways = (
            partial(contenders.plain_scpl, contenders.waits(1, seconds, steps)),
            partial(contenders.waiting, 1, seconds, steps),
            partial(contenders.waiting, stages, seconds, steps),
        )
        taken = [[way().seconds for way in ways] for _ in range(rounds)]
        loop, alone, together = (seconds / statistics.median(found) for found in zip(*taken, strict=True))
        print(
            f"  {together:.3f}  (aim {aim})  of the ideal with {stages} stages of {1000 * seconds:.0f} ms; a plain "
            f"loop of one such block reaches {loop:.3f}, one stage {alone:.3f}",
            flush=True,
        )


def replicas(rounds: int) -> None:
    """Print what more workers for a slow stage, and for the only one, are worth."""
    slow = contenders.settings("uneven", "small_data", 16, 60, samples=16, seconds=0.05)
    slow |= {"loss.name": f"{contenders.NETWORKS}:nothing", "loss.projector": "i"}
    for values, stages, more, text in (
        (slow, 2, [1, 2], "stages of 50 and 100 ms: a second worker for the slow one"),
        (MODELS["transformer"], 1, [2], "transformer, 1 stage: a second worker"),
        (MODELS["cnn"], 1, [2], "cnn, 1 stage, large projectors: a second worker"),
    ):
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for shared, seconds in found.items():
                chosen = {"pipeline.replicas": more} if shared else {}
                seconds.append(contenders.product(values | chosen, stages).seconds)
        ratio = statistics.median(found[False]) / statistics.median(found[True])
        print(f"  {ratio:.3f}  (ideal 2.0)  {text}", flush=True)


def start(rounds: int) -> None:
    """Print the seconds from the launch to the first finished step, without the imports of torch."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            options = ["-o", "run.epochs=1", "-o", "metrics.port=0", "--run-dir", str(run)]
            begun = time.time()
            subprocess.run(
                [sys.executable, "-m", "scpl_dist", "train", *options], check=True, capture_output=True
            )
            rows = MetricsLog(run / "metrics.jsonl").rows()
            ready = next(row["time"] for row in rows if row["event"] == "start")
            first = next(row["time"] for row in rows if row["event"] == "train")
            print(
                f"  {first - begun:.1f} s to the first step of a 2-stage run; {first - ready:.2f} s of it after start"
            )


def main() -> None:
    """Run what ``--only`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="ceiling,delays,replicas,start")
    arguments = parser.parse_args()
    print(machine.described())
    for name in arguments.only.split(","):
        if name == "ceiling":
            ceiling()
        elif name == "delays":
            delays(arguments.rounds)
        elif name == "replicas":
            replicas(arguments.rounds)
        elif name == "start":
            start(arguments.rounds)
        else:
            parser.error(f"--only {name}: use ceiling, delays, replicas, start")


if __name__ == "__main__":
    main()
