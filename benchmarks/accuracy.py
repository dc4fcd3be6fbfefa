"""Accuracy of local losses and of back-propagation on Fashion-MNIST, over equal steps and over equal seconds.

    python -m benchmarks.accuracy RUNS/methods                                       # trains what is not there yet
    python -m benchmarks.accuracy RUNS/methods --measure                             # seconds a step: an idle machine
    python -m benchmarks.accuracy RUNS/methods --table --picture docs/pictures/accuracy.png
    python -m benchmarks.accuracy RUNS/heads --study heads                           # a residual network, 4 blocks or 2

The number of stages changes no bit of an accuracy, and neither does what else the machine does; so every training is
one process of one thread, ``--at-once`` of them side by side. Seconds a step are measured apart, over two stages of one
thread each, all contenders in turn, medians of the rounds. "After equal seconds" is accuracy over steps, interpolated
between evaluations, with each step as long as it was measured to be: no evaluation is in it. The learning rate falls
over all steps, so whoever has done fewer of them at that moment would have done better with a schedule made for it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import contenders, machine
from scpl_dist.commands.report import COLOURS
from scpl_dist.storage.metrics_log import MetricsLog

CLOTHING = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist has them
COMMON: dict[str, Any] = {
    "data.augmentation": "none",
    "schedule.per": "step",
    "pipeline.stages": 1,
    "metrics.port": 0,
    "runtime.device": "cpu",
    "checkpoint.every_steps": 400,
}
METHODS: dict[str, dict[str, Any]] = {
    "scpl": {},
    "early_exit": {"run.method": "early_exit", "loss.classifier": "sigmoid,128"},
    "predsim": {"loss.name": "predsim"},
    "al": {"run.method": "al"},
    "bp": {"run.method": "bp"},
    "gpipe": {"run.method": "gpipe", "pipeline.micro_batches": 2},
}
TIMED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "scpl, 2 stages": ("scpl", 2, {}),
    "early_exit, 2 stages": ("early_exit", 2, {}),
    "predsim, 2 stages": ("predsim", 2, {}),
    "al, 2 stages": ("al", 2, {}),
    "bp, 1 process of 2 threads": ("bp", 1, {"runtime.threads": 2}),
    "bp, 2 stages": ("bp", 2, {}),
    **{f"gpipe, M = {m}, 2 stages": ("gpipe", 2, {"pipeline.micro_batches": m}) for m in (2, 4, 8)},
}
"""What is timed: the contender whose accuracy belongs to it, stages, and what it has besides."""
PAIRS = {"model.args": "{joined=2}"}
HEADS: dict[str, dict[str, Any]] = {
    "bp": {"run.method": "bp"},
    "scpl": {},
    "early_exit": {"run.method": "early_exit"},
    "scpl-pairs": PAIRS,
    "early_exit-pairs": {"run.method": "early_exit", **PAIRS},
}
STUDIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "methods": (
        {"run.epochs": 4, "model.name": f"{contenders.NETWORKS}:vgg28", "data.name": "fashion_mnist"},
        METHODS,
    ),
    "heads": (
        {"run.epochs": 2, "model.name": f"{contenders.NETWORKS}:resnet", "data.name": "fashion_mnist"},
        HEADS,
    ),
    "heads-digits": ({"run.epochs": 20, "model.name": f"{contenders.NETWORKS}:resnet"}, HEADS),
}
"""What all runs of a study have in common, and what each contender has of its own."""
Curve = list[tuple[float, float]]  # (steps, accuracy in per cent), from the first evaluation on


def train(folder: Path, label: str, seed: int, settings: Mapping[str, Any]) -> None:
    """Train into ``folder/label-seedN``, unless that has been done; a run that was interrupted goes on."""
    run = folder / f"{label}-seed{seed}"
    if (run / "result.json").is_file():
        return
    words = ["train", "--run-dir", str(run)]
    if (run / "config.toml").is_file():
        words += ["--resume", "auto"]
    else:
        for key, value in {**settings, "run.seed": seed}.items():
            words += ["-o", f"{key}={value}"]
    with Path(folder, f"{run.name}.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "scpl_dist", *words], stdout=log, stderr=log, check=False
        )
    print(f"{run.name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def measure(rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds a step of each contender of `TIMED`, medians of the rounds, which are printed as well."""
    found: dict[str, list[float]] = {name: [] for name in TIMED}
    values = contenders.settings("vgg28", "clothing_data", batch=128, steps=contenders.WARM_UP + steps)
    for number in range(rounds):
        for name, (label, stages, own) in TIMED.items():
            chosen = values | METHODS[label] | own
            method, parts = chosen.get("run.method", "scpl"), chosen.get("pipeline.micro_batches", 1)
            ran = contenders.product(chosen, stages, method, parts)
            found[name].append(1000 * ran.seconds)
            print(f"round {number}: {name}: {found[name][-1]:.1f} ms", flush=True)
    return {name: statistics.median(of) for name, of in found.items()}


def curves(folder: Path, label: str) -> list[Curve]:
    """Test accuracy after each epoch, of each seed whose training is done."""
    found = []
    for run in sorted(folder.glob(f"{label}-seed*")):
        if not (run / "result.json").is_file():
            continue
        rows = MetricsLog(run / "metrics.jsonl").rows()
        tested = [row for row in rows if row["event"] == "eval" and row["split"] == "test"]
        steps = json.loads((run / "result.json").read_text())["steps"] // len(tested)
        found.append([(steps * (row["epoch"] + 1), 100 * row["accuracy"]) for row in tested])
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, if there are several."""
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def middle(found: list[Curve]) -> Curve:
    """The mean of several seeds."""
    return [
        (points[0][0], statistics.fmean(accuracy for _, accuracy in points))
        for points in zip(*found, strict=True)
    ]


def at(points: Curve, steps: float) -> float:
    """Accuracy after a number of steps, between evaluations on a straight line; NaN before the first."""
    for (begin, low), (end, high) in pairwise(points):
        if begin <= steps <= end:
            return low + (high - low) * (steps - begin) / (end - begin)
    return points[-1][1] if steps >= points[-1][0] else math.nan


def table(folder: Path, labels: Sequence[str]) -> str:
    """A line for each contender: seeds, and accuracy after each epoch."""
    lines: list[str] = []
    for label in labels:
        found = curves(folder, label)
        if not found:
            continue
        if not lines:
            steps = [f"{step} steps" for step, _ in found[0]]
            lines += [f"| | seeds | {' | '.join(steps)} |", "|---" * (2 + len(steps)) + "|"]
        cells = [spread([accuracy for _, accuracy in points]) for points in zip(*found, strict=True)]
        lines.append(f"| `{label}` | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def timed_table(folder: Path, seconds: Mapping[str, float]) -> str:
    """A line for each timed contender: its step, all steps, and accuracy when the first of them has done all."""
    done = {
        name: middle(curves(folder, TIMED[name][0])) for name in seconds if curves(folder, TIMED[name][0])
    }
    totals = {name: points[-1][0] * seconds[name] / 1000 for name, points in done.items()}
    first = min(totals.values())
    lines = [f"| | ms a step | s for all steps | accuracy after {first:.0f} s |", "|---|---|---|---|"]
    for name, points in done.items():
        then = at(points, 1000 * first / seconds[name])
        lines.append(f"| {name} | {seconds[name]:.1f} | {totals[name]:.0f} | {then:.1f} |")
    return "\n".join(lines)


def picture(folder: Path, seconds: Mapping[str, float], target: Path) -> None:
    """Test accuracy over steps and over seconds, the mean of the seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for label, colour in zip(METHODS, COLOURS, strict=False):
        found = curves(folder, label)
        if not found:
            continue
        points = middle(found)
        names = [name for name in seconds if TIMED[name][0] == label]
        if label == "gpipe":
            names = [min(names, key=seconds.__getitem__)]
        steps, accuracies = zip(*points, strict=True)
        over_steps.plot(steps, accuracies, color=colour, marker="o", markersize=3, label=label)
        for name, style in zip(names, ("-", "--"), strict=False):
            times = [step * seconds[name] / 1000 for step in steps]
            over_seconds.plot(times, accuracies, style, color=colour, marker="o", markersize=3, label=name)
    for axes, what in ((over_steps, "steps of 128"), (over_seconds, "seconds of training, 2 cores")):
        axes.set_xlabel(what)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    over_steps.set_ylabel("test accuracy (%)")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    """Train what is not done, or measure, or print and draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--study", choices=STUDIES, default="methods")
    parser.add_argument("--only", help="contenders, separated by commas; all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--data", default=CLOTHING, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--measure", action="store_true", help="measure seconds a step instead")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement")
    parser.add_argument("--steps", type=int, default=40, help="steps that are measured")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    shared, own = STUDIES[given.study]
    labels = given.only.split(",") if given.only else list(own)
    measured = given.folder / "milliseconds.json"
    if given.measure:
        print(f"{machine.described()}, {given.rounds} rounds of {given.steps} steps")
        measured.write_text(json.dumps(measure(given.rounds, given.steps), indent=1))
    elif not given.table:
        with ThreadPoolExecutor(given.at_once) as pool:
            for seed in range(given.seeds):
                for label in labels:
                    settings = COMMON | {"data.root": given.data} | shared | own[label]
                    pool.submit(train, given.folder, label, seed, settings)
    print(table(given.folder, labels))
    if given.study == "methods" and measured.is_file() and table(given.folder, labels):
        seconds = json.loads(measured.read_text())
        print(timed_table(given.folder, seconds))
        if given.picture is not None:
            picture(given.folder, seconds, given.picture)


if __name__ == "__main__":
    main()
