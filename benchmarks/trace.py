"""What recording costs: ``trace.every = 1`` against none.

    python -m benchmarks.trace --rounds 5

Two measures. The first is exact also on a busy machine: seconds that a change of phase takes longer when it is
recorded, times the changes and messages of a step in a real run, against the seconds that a step is busy. The second is
what whole runs come to, with and without in turn, which other work on the machine disturbs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scpl_dist.run.phases import Phase
from scpl_dist.storage.spans import recordings
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.trace import Trace

CHANGES = 20_000
WHOSE: dict[str, Any] = {"rank": 0, "stage": 0, "replica": 0, "host": "", "generation": ""}


def seconds_of_a_change(folder: Path, every: int) -> float:
    """The least of some tries, the writing thread included, which works meanwhile."""
    tries = []
    for turn in range(7):
        timer = PhaseTimer()
        if every:
            timer.trace = Trace(folder / str(turn), "stage0", every, WHOSE)
            timer.trace.begin(0, 0)
        begin = time.process_time()
        for _ in range(CHANGES // 2):
            timer.enter(Phase.FORWARD)
            timer.enter(Phase.BACKWARD)
        if timer.trace is not None:
            timer.trace.close()
        tries.append((time.process_time() - begin) / CHANGES)
    return min(tries)


def train(run: Path, every: int) -> dict[str, Any]:
    """The result of a run of the embedded job."""
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    for text in ("run.epochs=15", "metrics.port=0", f"trace.every={every}"):
        command += ["-o", text]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    speeds: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, recorded = (seconds_of_a_change(folder, every) for every in (0, 1))
        print(f"a change of phase: {1e6 * plain:.2f} us, recorded {1e6 * recorded:.2f} us")
        for turn in range(rounds):
            for every in (0, 1) if turn % 2 else (1, 0):
                result = train(folder / f"run-{turn}-{every}", every)
                speeds[every].append(result["samples_per_second"])
        for stage, one in zip(
            result["per_stage"], recordings(folder / f"run-{rounds - 1}-1" / "log"), strict=True
        ):
            records = (len(one.spans) + len(one.messages)) / result["steps"]
            extra = records * (recorded - plain)
            busy = stage["busy_seconds"] / result["steps"]
            share = f"{1e6 * extra:.0f} us of {1e3 * busy:.1f} ms: {100 * extra / busy:.3f} %"
            print(f"stage {one.stage}: {records:.1f} records a step, {share}")
    medians = {every: statistics.median(found) for every, found in speeds.items()}
    shown = {every: ", ".join(f"{speed:.0f}" for speed in found) for every, found in speeds.items()}
    print(f"samples/s without: {shown[0]}; with: {shown[1]}")
    print(
        f"medians {medians[0]:.0f} and {medians[1]:.0f}: {100 * (1 - medians[1] / medians[0]):+.1f} % slower"
    )


if __name__ == "__main__":
    main()
