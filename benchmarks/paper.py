"""The paper's comparison (arXiv 2602.00062) at a size that two cores carry: speed-ups against naive model parallelism.

    python -m benchmarks.paper --only vgg8        # some ten minutes for each of vgg8, lstm, transformer

The paper's networks with a fraction of their widths and random inputs, each with 1, 2 and 4 stages and several batches,
on the runtime that `scpl-dist` has for all methods. Naive model parallelism is back-propagation over the same stages,
and "gpipe" the best of 2 and 4 micro-batches. One thread a worker; seconds are those of 10,000 samples, by the record
of what the last stage finished while the first one trained, too. Busy shares are those of all stages: what is left is
waiting, or no room at the next one. With more stages than cores the cores bound all methods alike: each share says how
much of a core a stage had use for.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scpl_dist
from benchmarks import contenders, machine
from benchmarks.contenders import NETWORKS

VOCABULARY = 4000
TEXTS = {
    "data.name": f"{NETWORKS}:text_data",
    "data.args": {"length": 30, "vocabulary": VOCABULARY},
    "loss.projector": "i",
}
MODELS: dict[str, dict[str, Any]] = {
    "vgg8": {"model.name": f"{NETWORKS}:vgg8_eighth", "data.name": f"{NETWORKS}:photo_data"},
    "lstm": {"model.name": "lstm", "model.args": {"vocabulary": VOCABULARY, "width": 76}} | TEXTS,
    "transformer": {
        "model.name": "transformer",
        "model.args": {"vocabulary": VOCABULARY, "width": 152, "heads": 4},
    }
    | TEXTS,
}
BRIDGES = {
    "vgg8": {"al.code": 64, "al.bridge": 312},
    "lstm": {"al.code": 64, "al.bridge": 0},
    "transformer": {"al.code": 64, "al.bridge": 0},
}
METHODS: dict[str, list[dict[str, Any]]] = {
    "naive": [{"run.method": "bp"}],
    "gpipe": [{"run.method": "gpipe", "pipeline.micro_batches": count} for count in (2, 4)],
    "early_exit": [{"run.method": "early_exit"}],
    "al": [{"run.method": "al"}],
    "scpl": [{"run.method": "scpl"}],
}


@dataclass(frozen=True)
class Measured:
    """Seconds of 10,000 samples, and the share of the time in which a stage was busy, the mean of all."""

    seconds: float
    busy: float


def measured(model: str, chosen: dict[str, Any], stages: int, batch: int) -> Measured:
    """One run of one epoch."""
    values = MODELS[model] | {
        "run.epochs": 1,
        "data.batch_size": batch,
        "data.augmentation": "none",
        "metrics.port": 0,
        "runtime.device": "cpu",
        "pipeline.stages": stages,
    }
    steps = contenders.WARM_UP + contenders.lead(stages) + max(6, 512 // batch)
    values["data.args"] = values.get("data.args", {}) | {"size": batch * steps}
    if chosen["run.method"] == "al":
        values |= BRIDGES[model]
    if chosen["run.method"] != "scpl":
        values.pop("loss.projector", None)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = scpl_dist.train(settings=values | chosen, run_dir=run)
        seconds = contenders.seconds_a_step(run) / batch * 10_000
    shares = []
    for one in result["per_stage"]:
        parts = [one[f"{name}_seconds"] for name in ("busy", "waiting", "blocked")]
        shares.append(parts[0] / sum(parts))
    return Measured(seconds, sum(shares) / len(shares))


def main() -> None:
    """Run what ``--only`` names and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--batches", default="32,128,512")
    parser.add_argument("--stages", default="1,2,4")
    given = parser.parse_args()
    print(machine.described())
    for model in given.only.split(","):
        print(f"\n{model}\n")
        print(
            "| batch | stages | naive, s | "
            + " | ".join(list(METHODS)[1:])
            + " | busy: naive | gpipe | scpl |"
        )
        print("|---" * (len(METHODS) + 5) + "|")
        for batch in map(int, given.batches.split(",")):
            for stages in map(int, given.stages.split(",")):
                found = {
                    name: min(
                        (measured(model, way, stages, batch) for way in ways), key=lambda one: one.seconds
                    )
                    for name, ways in METHODS.items()
                }
                base = found["naive"].seconds
                ratios = [f"{base / one.seconds:.2f}" for name, one in found.items() if name != "naive"]
                busy = [f"{100 * found[name].busy:.0f} %" for name in ("naive", "gpipe", "scpl")]
                print(f"| {batch} | {stages} | {base:.1f} | " + " | ".join(ratios + busy) + " |", flush=True)


if __name__ == "__main__":
    main()
