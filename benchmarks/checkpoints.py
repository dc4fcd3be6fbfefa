"""What a checkpoint every 20 steps costs: the same run with and without, in turn.

    python benchmarks/checkpoints.py --rounds 5

Time is taken between the first step after the 20th and the last step of the last stage, from ``metrics.jsonl``, so
start and end do not count and everything in between does. Prints the medians, the fastest rounds and the loss of
throughput by both; the aim is at most 2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SKIP = 20


def seconds_a_step(folder: Path, every: int, model: str, epochs: int, stages: int) -> tuple[float, int, int]:
    """One run: seconds a step, number of checkpoints and bytes of one."""
    run = folder / "run"
    settings = {"metrics.port": 0, "model.name": model, "run.epochs": epochs, "pipeline.stages": stages}
    settings |= {"checkpoint.every_steps": every, "checkpoint.best": "false"}
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = {
        row["step"]: row["time"] for row in rows if row["event"] == "train" and row["stage"] == stages - 1
    }
    last = max(times)
    written = [row for row in rows if row["event"] == "checkpoint" and SKIP < row["step"] <= last]
    size = max(row["bytes"] for row in rows if row["event"] == "checkpoint")
    return (times[last] - times[SKIP]) / (last - SKIP), len(written), size


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
    options = parser.parse_args()
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
