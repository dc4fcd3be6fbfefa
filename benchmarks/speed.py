"""How fast is the stream? ``python -m benchmarks.speed [--rounds 3] [--only cnn,transformer,delays,replicas,start]``.

All contenders run in turn in each round, with one thread a worker, on this machine; ratios are of medians over the
rounds. Random data, no augmentation, equal batches, models and optimizers. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders

MODELS: dict[str, dict[str, Any]] = {
    "cnn": contenders.settings("cnn", "image_data", batch=64, steps=24),
    "transformer": contenders.settings("transformer", "token_data", batch=32, steps=24),
}
DELAYS = [(16, 0.05, 60, 0.99), (8, 0.02, 150, 0.95)]
"""Stages, seconds of a stage's work, steps, aim."""


def measure(values: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds a step of every contender."""
    runs: dict[str, Callable[[], float]] = {
        "plain loop, SCPL, 1 process": lambda: contenders.plain_scpl(values),
        "plain loop, BP, 1 process": lambda: contenders.plain_bp(values),
        "scpl_dist, SCPL, 1 stage": lambda: contenders.product(values, 1),
        "scpl_dist, SCPL, 2 stages": lambda: contenders.product(values, 2),
        "torch GPipe M=1 (naive BP), 2 stages": lambda: contenders.torch_gpipe(values, 1),
    }
    for count in (2, 4, 8):
        runs[f"torch GPipe M={count}, 2 stages"] = partial(contenders.torch_gpipe, values, count)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
            print(f"  round {number}: {name}: {1000 * seconds[name][-1]:.1f} ms", flush=True)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def compare(model: str, rounds: int) -> None:
    """Print the ratios for one model."""
    print(f"{model}: {rounds} rounds")
    times = measure(MODELS[model], rounds)
    ours = times["scpl_dist, SCPL, 2 stages"]
    best = min(
        (name for name in times if name.startswith("torch GPipe M=") and "=1" not in name),
        key=times.__getitem__,
    )
    for text, other, aim in [
        ("2 stages against the same blocks in one process", times["plain loop, SCPL, 1 process"] / ours, 1.9),
        (
            "2 stages against BP over the same stages",
            times["torch GPipe M=1 (naive BP), 2 stages"] / ours,
            2.0,
        ),
        (f"2 stages against the best of {best}", times[best] / ours, 1.25),
        (
            "1 stage against a plain loop",
            times["plain loop, SCPL, 1 process"] / times["scpl_dist, SCPL, 1 stage"],
            0.98,
        ),
    ]:
        print(f"  {other:.3f}  (aim {aim})  {text}", flush=True)


def ceiling(values: dict[str, Any]) -> None:
    """What two independent processes reach on this machine: no pipeline of two stages can be faster."""
    alone = contenders.plain_scpl(values)
    both = contenders.two_at_once(values)
    print(
        f"  {2 * alone / both:.3f}  ceiling: two independent processes at once against one alone", flush=True
    )


def delays(rounds: int) -> None:
    """Print the share of the ideal throughput for stages that only wait."""
    for stages, seconds, steps, aim in DELAYS:
        values = contenders.settings("delays", "small_data", 16, steps, stages=stages, seconds=seconds)
        values |= {"loss.name": f"{contenders.NETWORKS}:nothing", "loss.projector": "i"}
        values["runtime.timeout_s"] = 300.0  # many processes import torch on few cores
        shares = [seconds / contenders.product(values, stages) for _ in range(rounds)]
        text = f"of the ideal with {stages} stages of {1000 * seconds:.0f} ms"
        print(f"  {statistics.median(shares):.3f}  (aim {aim})  {text}", flush=True)


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
                seconds.append(contenders.product(values | chosen, stages))
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
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            ready = next(row["time"] for row in rows if row["event"] == "start")
            first = next(row["time"] for row in rows if row["event"] == "train")
            print(
                f"  {first - begun:.1f} s to the first step of a 2-stage run; {first - ready:.2f} s of it after start"
            )


def main() -> None:
    """Run what ``--only`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="cnn,transformer,delays,replicas,start")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}")
    for name in arguments.only.split(","):
        if name in MODELS:
            ceiling(MODELS[name])
            compare(name, arguments.rounds)
        elif name == "delays":
            delays(arguments.rounds)
        elif name == "replicas":
            replicas(arguments.rounds)
        elif name == "start":
            start(arguments.rounds)
        else:
            parser.error(f"--only {name}: use {', '.join(MODELS)}, delays, replicas, start")


if __name__ == "__main__":
    main()
