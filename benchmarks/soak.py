"""Disturb a run again and again, at random, and compare its result with that of an undisturbed run.

    python benchmarks/soak.py --events 200

While a run of 1 to 4 stages goes on, its workers are killed, stopped (SIGSTOP), slowed down, drained, and joined by
others; now and then a worker is slowed down until blocks have moved away from it, or the coordinator or the launcher
is killed, which starts all again. Each event waits for a step that is new, as a run that makes no progress between
failures is right to give up. One worker is spared where that is possible. Prints what happened, the seconds from each
event until all train again, whether all losses and weights are the same to the last bit, what is left over, and what
has grown in the coordinator and in the worker that was spared. Exit code 1 if anything differs or is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scpl_dist.storage.metrics_log import MetricsLog

STEPS_PER_EPOCH = 5
EPOCHS_PER_EVENT = 3
SETTINGS = {
    "data.batch_size": 256,
    "data.augmentation": "none",
    "metrics.port": 0,
    "checkpoint.every_steps": 5,
    "model.name": f"{__file__}:blocks",
    "loss.projector": "l,32,32",  # so that a block's time is its pace
    "pipeline.stages": 2,
    "pipeline.elastic": [1, 4],
    "pipeline.balance": "auto",
    "runtime.timeout_s": 4,
    "runtime.first_step_timeout_s": 60,
    "runtime.replace_s": 20,
}
# How often each comes, beside the others; the first of all come in this order.
EVENTS = {"kill": 10, "stop": 2, "slow": 4, "move": 2, "drain": 4, "join": 5, "coordinator": 1, "launcher": 1}
MOVED_S = 45.0  # within which blocks should have moved
KNOWN = 30  # steps of all blocks on workers that nothing holds back, before one of them is slowed down


class Paced(nn.Module):
    """A block that takes some time, and more in a process that shall be slow: the bits do not know."""

    def __init__(self, width: int, pace_s: float, slow: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self._pace_s, self._slow = pace_s, slow

    def forward(self, inputs: Tensor) -> Tensor:
        """Of shape (batch, 32)."""
        if self._pace_s:
            slow = Path(self._slow, str(os.getpid())).exists()
            time.sleep(self._pace_s * (6 if slow else 1))
        found: Tensor = self.layers(inputs.flatten(1))
        return found


def blocks(classes: int, pace_s: float, slow: str) -> list[nn.Module]:
    """The model of the soak."""
    return [Paced(256, pace_s, slow), *[Paced(32, pace_s, slow) for _ in range(7)]]


class Soak:
    """The disturbed run, and what is done to it."""

    def __init__(self, run: Path, slow: Path, epochs: int, seed: int, pace_s: float) -> None:
        self.run, self._slow = run, slow
        self._random = random.Random(seed)
        self._settings: dict[str, Any] = {"run.epochs": epochs, "runtime.max_restarts": 100_000}
        self._settings |= {"model.args.pace_s": pace_s, "model.args.slow": str(slow)}
        self.events: list[tuple[float, str]] = []  # when, and what
        self.helpers: list[subprocess.Popen[bytes]] = []
        self.spared = 0
        self._furthest = 0
        self._first = list(EVENTS)
        self.sizes: dict[str, list[tuple[int, dict[str, int]]]] = defaultdict(
            list
        )  # by role: pid, and what it has
        self._launcher = self._start(resume=False)

    def _start(self, resume: bool) -> subprocess.Popen[bytes]:
        return start(self.run, self._settings, resume)

    def conduct(self, events: int) -> None:
        """Until the run is over; raises SystemExit if it fails."""
        while True:
            try:
                code = self._launcher.wait(self._random.uniform(0.1, 0.5))
            except subprocess.TimeoutExpired:
                if len(self.events) < events:
                    self._disturb()
                continue
            if code == 0:
                return
            if code != -9:
                print((self.run.parent / f"{self.run.name}.log").read_text()[-3000:], file=sys.stderr)
                raise SystemExit(f"the run ended with code {code}")
            self._launcher = self._start(resume=True)

    def _disturb(self) -> None:
        status = self._status()
        if status is None or status["step"] <= self._furthest:
            return
        self._furthest = status["step"]
        workers = [worker for worker in status["workers"] if worker["up"] and worker["pid"]]
        self._measure(workers)
        victims = [worker for worker in workers if worker["pid"] != self.spared]
        drawn = self._random.choices(list(EVENTS), list(EVENTS.values()))[0]
        what = self._first.pop(0) if self._first else drawn
        with suppress(psutil.NoSuchProcess, IndexError):
            self._do(what, victims, len(workers))

    def _do(self, what: str, victims: list[dict[str, Any]], workers: int) -> None:
        now = time.time()
        if what == "launcher":
            self._launcher.kill()
        elif what == "coordinator":
            run = json.loads((self.run / "run.json").read_text())
            psutil.Process(run["pid"]).kill()
        elif what == "move":
            victims = [worker for worker in victims if len(worker["losses"]) > 1]  # each stage keeps a block
            if not self._moved(self._random.choice(victims)["pid"]):
                if not self.moves():  # each soak shall have one
                    self._first.append("move")
                return
            now = time.time()
        elif what == "join":
            if workers >= 4:
                return
            command = [sys.executable, "-m", "scpl_dist", "join", self.run]
            self.helpers.append(self._helper(command))
            return  # which takes effect when it has imported torch
        else:
            victim = self._random.choice(victims)
            process = psutil.Process(victim["pid"])
            if what == "kill":
                process.kill()
            elif what == "stop":
                process.suspend()
            elif what == "drain":
                if workers < 2:
                    return
                process.terminate()
            else:
                mark = self._slow / str(victim["pid"])
                if mark.exists():
                    mark.unlink()
                else:
                    mark.touch()
        self.events.append((now, what))

    def _moved(self, pid: int) -> bool:
        """Slow one worker down, and no other, until blocks move; False if they do not, or the run does without it.

        Not at once: who has only ever seen a block on a worker that is held back takes the block for a dear one.
        """
        for mark in self._slow.iterdir():
            mark.unlink()
        mark = self._slow / str(pid)
        before, known, deadline = self.moves(), self._furthest + KNOWN, time.monotonic() + MOVED_S
        while self.moves() == before:
            status = self._status()
            gone = status is not None and pid not in [worker["pid"] for worker in status["workers"]]
            if gone or self._launcher.poll() is not None:
                return False
            if status is not None and status["step"] >= known:
                mark.touch()
            if time.monotonic() > deadline:  # after some moves the balance has more patience than that
                break
            time.sleep(0.2)
        mark.unlink(missing_ok=True)
        return self.moves() > before

    def moves(self) -> int:
        """How often blocks have moved."""
        return sum(row["event"] == "move" for row in MetricsLog(self.run / "metrics.jsonl").rows())

    def _helper(self, command: list[Any]) -> subprocess.Popen[bytes]:
        with (self.run.parent / "helpers.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _status(self) -> dict[str, Any] | None:
        try:
            url = json.loads((self.run / "run.json").read_text())["metrics"].removesuffix("/metrics")
            with urllib.request.urlopen(f"{url}/status", timeout=2) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError, KeyError):
            return None

    def _measure(self, workers: list[dict[str, Any]]) -> None:
        """What the coordinator and the worker that is spared have of the machine."""
        pids = [worker["pid"] for worker in workers]
        if self.spared not in pids:
            self.spared = pids[0] if pids else 0
        with suppress(psutil.NoSuchProcess, OSError, ValueError):
            coordinator = json.loads((self.run / "run.json").read_text())["pid"]
            for role, pid in (("coordinator", coordinator), ("worker", self.spared)):
                process = psutil.Process(pid)
                has = {"threads": process.num_threads(), "descriptors": process.num_fds()}
                self.sizes[role].append((pid, has | {"MiB": process.memory_info().rss >> 20}))

    def growth(self) -> list[str]:
        """Of the process of each role that lived longest: its sizes at five times of its life."""
        lines = []
        for role, found in self.sizes.items():
            longest = Counter(pid for pid, _ in found).most_common(1)[0][0]
            sizes = [has for pid, has in found if pid == longest]
            times = [sizes[(len(sizes) - 1) * quarter // 4] for quarter in range(5)]
            parts = [f"{name} {' '.join(str(has[name]) for has in times)}" for name in sizes[0]]
            lines.append(f"{role}, at 5 of {len(sizes)} looks: {', '.join(parts)}")
        return lines

    def pauses(self) -> list[tuple[float, str]]:
        """Seconds from each event that the workers met anew after, until all trained again.

        Not to a row of a step: one that another event makes void is written again later.
        """
        found = MetricsLog(self.run / "metrics.jsonl").rows()
        starts = [row["time"] for row in found if row["event"] == "start"]
        pauses = []
        for number, (when, what) in enumerate(self.events):
            until = self.events[number + 1][0] if number + 1 < len(self.events) else float("inf")
            met = next((time_ for time_ in starts if when < time_), None)
            if met is None or met > until or what == "slow":
                continue  # another event came before they had met, or nobody noticed
            pauses.append((met - when, what))
        return pauses


def start(run: Path, settings: dict[str, Any], resume: bool) -> subprocess.Popen[bytes]:
    """One launcher."""
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += ["--resume", "auto"] if resume else []
    command += [part for key, value in (SETTINGS | settings).items() for part in ("-o", f"{key}={value}")]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Exported weights."""
    target = run.parent / f"{run.name}.safetensors"
    subprocess.run(
        [sys.executable, "-m", "scpl_dist", "export", run, target], check=True, capture_output=True
    )
    return load_file(target)


def losses(run: Path) -> dict[tuple[int, int], Any]:
    """By step and block; each must be there once."""
    found = [
        ((row["step"], row["block"]), row["terms"])
        for row in MetricsLog(run / "metrics.jsonl").rows()
        if row["event"] == "train"
    ]
    if len(dict(found)) != len(found):
        raise SystemExit("a step is in metrics.jsonl twice")
    return dict(found)


def belonging(folder: Path) -> list[psutil.Process]:
    """Processes of the runs in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@contextmanager
def ended(folder: Path) -> Iterator[None]:
    """Whatever happens, no run in a folder goes on afterwards."""
    try:
        yield
    finally:
        for process in belonging(folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.005, help="seconds that a block takes at least")
    options = parser.parse_args()
    epochs = max(40, EPOCHS_PER_EVENT * options.events)
    with tempfile.TemporaryDirectory() as folder, ended(Path(folder)):
        calm, run, slow = Path(folder, "undisturbed"), Path(folder, "soak"), Path(folder, "slow")
        slow.mkdir()
        alone = {"run.epochs": epochs, "pipeline.stages": 1, "pipeline.elastic": []}
        alone |= {"model.args.pace_s": 0.0, "model.args.slow": str(slow)}
        undisturbed = start(calm, alone, resume=False)
        begin = time.monotonic()
        soak = Soak(run, slow, epochs, options.seed, options.pace)
        soak.conduct(options.events)
        seconds = time.monotonic() - begin
        for helper in soak.helpers:  # one that was stopped, and given up, has yet to hear of it
            helper.send_signal(signal.SIGCONT)
            helper.wait(90)
        if undisturbed.wait() != 0:
            raise SystemExit((calm.parent / f"{calm.name}.log").read_text()[-3000:])
        met = Counter(
            row["stages"] for row in MetricsLog(run / "metrics.jsonl").rows() if row["event"] == "start"
        )
        moves = soak.moves()
        orphans = [" ".join(process.info["cmdline"]) for process in belonging(run)]
        same_losses = losses(run) == losses(calm)
        left, right = weights(run), weights(calm)
        same_weights = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
        happened = Counter(what for _, what in soak.events)
        joins = len(soak.helpers)
        pauses: dict[str, list[float]] = defaultdict(list)
        for pause, what in soak.pauses():
            pauses[what].append(pause)
    print(f"{epochs * STEPS_PER_EPOCH} steps, {sum(happened.values()) + joins} events in {seconds:.0f} s")
    parts = [f"{name} {count}" for name, count in happened.most_common()]
    print(f"events: {', '.join(parts)}, join {joins}; blocks moved {moves} times")
    print("groups by their number of stages: " + ", ".join(f"{key}: {met[key]}" for key in sorted(met)))
    for what, found in sorted(pauses.items()):
        print(
            f"{what} until all train again: median {statistics.median(found):.2f} s, longest {max(found):.2f} s"
        )
    for line in soak.growth():
        print(line)
    print(f"left over: {orphans or 'nothing'}")
    print(f"losses of all steps and blocks identical: {same_losses}; weights identical: {same_weights}")
    return 0 if same_losses and same_weights and not orphans else 1


if __name__ == "__main__":
    sys.exit(main())
