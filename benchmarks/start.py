"""How long a user waits: from the command to the first finished step, and from a kill to the next one.

    python benchmarks/start.py --rounds 5

Prints the seconds of each round and their medians, for the embedded job. Beside them stands what one import of torch
takes on this machine at the moment, since a start cannot be faster.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scpl_dist.storage.metrics_log import MetricsLog


def first_step(run: Path, starts: int, process: subprocess.Popen[bytes]) -> float:
    """The time of day at which a run finished its first step after so many starts of a group."""
    log = MetricsLog(run / "metrics.jsonl")
    while True:
        rows = log.rows()
        begun = [place for place, row in enumerate(rows) if row["event"] == "start"]
        if len(begun) >= starts:
            found = [row["time"] for row in rows[begun[starts - 1] :] if row["event"] == "train"]
            if found:
                return float(found[0])
        assert process.poll() is None, "the run has ended"
        time.sleep(0.05)


def measure(run: Path) -> tuple[float, float]:
    """Seconds of a start, and of a restart after one worker was killed."""
    settings = ["run.epochs=1000", "metrics.port=0", "runtime.max_restarts=1", "checkpoint.every_steps=2"]
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += [part for text in settings for part in ("-o", text)]
    begin = time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            first = first_step(run, 1, process) - begin
            while not (run / "checkpoints" / "latest").exists():
                time.sleep(0.01)
            victim = worker(run)
            killed = time.time()
            os.kill(victim, signal.SIGKILL)
            return first, first_step(run, 2, process) - killed
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def worker(run: Path) -> int:
    """Process id of stage 1."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(f"scpl-dist: stage 1 {run}"):
            return int(process.pid)
    raise AssertionError("stage 1 is not there")


def text(seconds: Sequence[float]) -> str:
    """Such as "import torch 1.12 s, ..."."""
    names = ("import torch", "start", "restart")
    return ", ".join(f"{name} {value:.2f} s" for name, value in zip(names, seconds, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds: int = parser.parse_args().rounds
    rows = []
    for number in range(rounds):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_s = time.monotonic() - begin
        with tempfile.TemporaryDirectory() as folder:
            rows.append((torch_s, *measure(Path(folder, "run"))))
        print(f"round {number}: {text(rows[-1])}", flush=True)
    print(f"medians: {text([statistics.median(column) for column in zip(*rows, strict=True)])}")


if __name__ == "__main__":
    main()
