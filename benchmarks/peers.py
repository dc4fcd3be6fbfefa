"""Training steps of a stream of local losses beside those of everything else that two processes can do.

    python -m benchmarks.peers                                         # an hour: all models, three rounds
    python -m benchmarks.peers --only cnn,transformer --ways kept --picture docs/pictures/peers.png

The same blocks, data, batches and Adam for all, one thread a process where nothing else is said. Contenders take
turns in each round; figures are medians over the rounds, milliseconds a step and the peak of the resident memory of the
largest process (which has imported torch, some 300 MiB). Back-propagation has one predictor; SCPL's blocks have
projectors besides. Naive is model parallelism of one micro-batch. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import contenders, machine
from benchmarks.contenders import Figures

MODELS: dict[str, dict[str, Any]] = {
    "cnn": contenders.settings("cnn", "image_data", batch=64, steps=64),
    "uneven_cnn": contenders.settings("uneven_cnn", "photo_data", batch=64, steps=64),
    "transformer": contenders.settings("transformer", "token_data", batch=32, steps=64),
    "lstm": contenders.settings("lstm", "token_data", batch=64, steps=64),
    "resnet18": contenders.settings(":resnet18", "photo_data", batch=32, steps=14),
    "vgg8": contenders.settings(":vgg8", "photo_data", batch=32, steps=14),
}
# The published projector reads every pixel of every channel; pooled, it reads a quarter of them.
MODELS["resnet18_pooled"] = MODELS["resnet18"] | {"loss.projector": "m,avg"}
# And the first of its four blocks costs more than the others together.
MODELS["vgg8_pooled"] = MODELS["vgg8"] | {"loss.projector": "m,avg", "pipeline.partition": [1, 3]}
IMAGES = {*MODELS} - {"transformer", "lstm"}
WAYS: dict[str, dict[str, Any]] = {
    "given back": {"runtime.keep_memory": False},
    "kept": {},
    "bf16": {"runtime.precision": "bfloat16"},
}
"""Freed memory goes back to the kernel, as with glibc; is kept; and bfloat16 besides, with channels_last for images."""
LOCAL, END_TO_END, TORCH = "#0072B2", "#8D97A1", "#D55E00"


def entrants(
    values: dict[str, Any], micro_batches: list[int]
) -> dict[str, tuple[str, Callable[[], Figures]]]:
    """Colour of each contender, and what runs it."""
    found: dict[str, tuple[str, Callable[[], Figures]]] = {
        "BP, 1 process": (END_TO_END, partial(contenders.plain_bp, values)),
        "BP, 1 process, 2 threads": (END_TO_END, partial(contenders.plain_bp, values, 2)),
        "naive, 2 stages": (END_TO_END, partial(contenders.torch_pipeline, values, "GPipe", 1)),
    }
    for name in ("GPipe", "1F1B", "ZBVZeroBubble"):
        for count in micro_batches:
            run = partial(contenders.torch_pipeline, values, name, count)
            found[f"{name}, M = {count}"] = TORCH, run
    found["plain loop of SCPL, 1 process"] = LOCAL, partial(contenders.plain_scpl, values)
    single = values | {"pipeline.partition": "uniform"}
    found["scpl, 1 stage"] = LOCAL, partial(contenders.product, single, 1)
    shared = single | {"pipeline.replicas": [2]}
    found["scpl, 1 stage of 2 replicas"] = LOCAL, partial(contenders.product, shared, 1)
    found["scpl, 2 stages"] = LOCAL, partial(contenders.product, values, 2)
    return found


def measure(values: dict[str, Any], micro_batches: list[int], rounds: int) -> dict[str, Figures]:
    """Medians of all contenders that can do it."""
    found: dict[str, list[Figures]] = {}
    out: set[str] = set()
    for number in range(rounds):
        for name, (_, run) in entrants(values, micro_batches).items():
            if name in out:
                continue
            try:
                figures = run()
            except Exception as error:  # of another's pipeline: said, and the others go on
                print(f"  {name}: does not run: {type(error).__name__}: {error}", flush=True)
                out.add(name)
                continue
            found.setdefault(name, []).append(figures)
            print(f"  round {number}: {name}: {1000 * figures.seconds:.1f} ms", flush=True)
    return {
        name: Figures(statistics.median(one.seconds for one in of), statistics.median(one.peak for one in of))
        for name, of in found.items()
    }


def table(found: dict[str, Figures]) -> str:
    """A line for each contender: ms a step, times as fast as BP in one process, MiB."""
    base = found["BP, 1 process"].seconds
    lines = ["| | ms a step | x BP, 1 process | peak MiB |", "|---|---|---|---|"]
    for name, one in found.items():
        lines.append(f"| {name} | {1000 * one.seconds:.0f} | {base / one.seconds:.2f} | {one.peak:.0f} |")
    return "\n".join(lines)


def ratios(found: dict[str, Figures]) -> str:
    """What is aimed at, and what was reached."""
    ours = found["scpl, 2 stages"].seconds
    torchs = {name: one.seconds for name, one in found.items() if ", M = " in name}
    lines = [f"{found['plain loop of SCPL, 1 process'].seconds / ours:.2f} x the same blocks in one process"]
    if torchs:
        best = min(torchs, key=torchs.__getitem__)
        lines.append(f"{torchs[best] / ours:.2f} x the best of torch's ({best})")
    lines.append(f"{found['BP, 1 process, 2 threads'].seconds / ours:.2f} x BP with 2 threads")
    return "scpl, 2 stages: " + ", ".join(lines)


def picture(results: dict[str, dict[str, Figures]], target: Path) -> None:
    """Steps a second against BP in one process, a panel for each model and way."""
    figure = Figure(figsize=(4.6 * len(results), 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, found) in zip(panels, results.items(), strict=True):
        base = found["BP, 1 process"].seconds
        names = list(found)[::-1]
        colours = [entrants({}, [2, 4, 8, 16])[name][0] for name in names]
        bars = axes.barh(names, [base / found[name].seconds for name in names], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(length=0, labelsize=8)
        axes.axvline(1, color="#444c55", linewidth=0.6)
        axes.margins(x=0.12)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("steps a second, BP in one process = 1", fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def main() -> None:
    """Run what ``--only`` and ``--ways`` name, print tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--micro-batches", default="2,4,8,16")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    print(f"{machine.described()}, {given.rounds} rounds")
    results: dict[str, dict[str, Figures]] = {}
    for model in given.only.split(","):
        for way in given.ways.split(","):
            values = MODELS[model] | WAYS[way]
            if way == "bf16" and model in IMAGES:
                values |= {"runtime.memory_format": "channels_last"}
            print(f"\n{model}, {way}:", flush=True)
            counts = [int(count) for count in given.micro_batches.split(",")]
            found = measure(values, counts, given.rounds)
            results[f"{model}, {way}"] = found
            print(f"{table(found)}\n{ratios(found)}", flush=True)
    if given.picture is not None:
        picture(results, given.picture)


if __name__ == "__main__":
    main()
