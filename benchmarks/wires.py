"""What a narrow wire between stages takes from the features, and what that does to the accuracy.

    python -m benchmarks.wires [--only digits,docstrings,gpipe] [--stages 2,4] [--seeds 3]

Trains with each type of ``pipeline.wire_dtype`` and number of stages; with float32 by the first number only, as that
changes no bit. Errors are those of the outputs of all blocks but the last one, for one batch of the test part, by the
weights that float32 has come to: the length of what rounding took by that of the output, smallest and largest. Bytes
are those of all tensors that one stage sends the next, labels and evaluations included, by the steps; the most of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import scpl_dist
from benchmarks import machine
from scpl_dist import data
from scpl_dist.methods.block import floating
from scpl_dist.run.config import load
from scpl_dist.transport.tensors import narrow, widen

WIRES = ("float32", "bfloat16", "int8")
RUNS: dict[str, dict[str, Any]] = {
    "digits": {"run.epochs": 8},
    "docstrings": {
        "model.name": "transformer_tiny",
        "data.name": "docstrings",
        "data.args.length": 30,
        "loss.projector": "i",
        "run.epochs": 6,
    },
    "gpipe": {"run.method": "gpipe", "pipeline.micro_batches": 2, "run.epochs": 8},
}


def errors(run: str, wire: str) -> list[float]:
    """Of each block of a trained model but the last one."""
    found: list[float] = []

    def compare(block: nn.Module, given: Any, output: Any) -> None:
        arrived = widen(*narrow(output, getattr(torch, wire)))
        for own, other in zip(floating(output), floating(arrived), strict=True):
            found.append(float((other - own).norm() / own.norm()))

    model = scpl_dist.load(run)
    for block in list(model.blocks)[:-1]:
        block.register_forward_hook(compare)
    inputs, _ = data.resolve(load(Path(run, "config.toml"))).batch("test", 0, torch.arange(128))
    with torch.no_grad():
        model(inputs)
    return found


def rows(name: str, numbers: list[int], seeds: int, folder: Path) -> Iterator[str]:
    """A line for each type and number of stages."""
    for wire in WIRES:
        for stages in numbers[:1] if wire == "float32" else numbers:
            results = []
            for seed in range(seeds):
                own = {"pipeline.wire_dtype": wire, "pipeline.stages": stages, "run.seed": seed}
                run = folder / f"{name}-{wire}-{stages}-{seed}"
                results.append(scpl_dist.train(settings=RUNS[name] | own, run_dir=run))
            sent = max(max(one["bytes_to"].values(), default=0) for one in results[0]["per_stage"])
            lost = errors(str(folder / f"{name}-float32-{numbers[0]}-0"), wire)
            accuracies = ", ".join(f"{100 * one['accuracy_last']:.1f}" for one in results)
            figures = (
                f"{100 * min(lost):.2f} to {100 * max(lost):.2f} % | {sent / results[0]['steps'] / 1e6:.3f}"
            )
            yield f"| {name} | {wire} | {stages} | {figures} | {accuracies} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--stages", default="2,4")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(machine.described())
    print(
        "| | wire | stages | error | MB a step | accuracy of each seed, % |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only.split(","):
            for row in rows(name, list(map(int, given.stages.split(","))), given.seeds, Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
