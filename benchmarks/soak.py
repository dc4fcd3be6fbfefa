"""Kill a run again and again, at random, and compare its result with that of an undisturbed run.

    python benchmarks/soak.py --kills 50

Victims are the stages, the coordinator (both by `scpl_dist.run.faults`, at a random phase of a random step) and the
launcher (from outside). The launcher restarts the group by itself; after its own death this script resumes the run.
Prints what was killed, how long each restart took, and whether all losses and weights are the same to the last bit.
Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scpl_dist.run.faults import VARIABLE, Fault

PHASES = (None, "forward", "loss", "backward", "optimizer", "receive", "send", "write", "written", "evaluate")
STEPS_PER_EPOCH = 5
SETTINGS = {
    "data.batch_size": 256,
    "data.augmentation": "none",
    "metrics.port": 0,
    "checkpoint.every_steps": 2,
    "runtime.timeout_s": 60,
}


def draw(kills: int, stages: int, steps: int, seed: int) -> tuple[list[Fault], list[int]]:
    """Faults of stages and coordinator, and the steps at which the launcher is killed."""
    random_ = random.Random(seed)
    faults, launcher = [], []
    for step in sorted(random_.sample(range(1, steps), kills)):
        victim = random_.choices(["stage", "coordinator", "launcher"], [7, 2, 1])[0]
        if victim == "launcher":
            launcher.append(step)
        elif victim == "coordinator":
            state = random_.choice(["running", "commit", "committed"])
            faults.append(Fault(action="kill", role="coordinator", step=step, phase=state))
        else:
            stage = random_.randrange(stages)
            phase: str | None = random_.choice(PHASES)
            if phase == "send" and stage == stages - 1:  # which sends nothing
                phase = "loss"
            faults.append(Fault(action="kill", stage=stage, step=step, phase=phase))
    return faults, launcher


def start(run: Path, epochs: int, stages: int, faults: list[Fault], resume: bool) -> subprocess.Popen[bytes]:
    """One launcher."""
    settings = SETTINGS | {"run.epochs": epochs, "pipeline.stages": stages}
    settings |= {"runtime.max_restarts": 10 * len(faults)}
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += ["--resume", "auto"] if resume else []
    command += [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    environment = {VARIABLE: json.dumps([fault.model_dump(exclude_none=True) for fault in faults])}
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file so far."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def at_step(run: Path, step: int) -> bool:
    """Whether the run has come to this step."""
    return any(row["event"] == "train" and row["step"] >= step for row in rows(run / "metrics.jsonl"))


def conduct(run: Path, epochs: int, stages: int, faults: list[Fault], launcher: list[int]) -> list[float]:
    """The whole run; returns when the launcher was killed, in wall time."""
    killed: list[float] = []
    process = start(run, epochs, stages, faults, resume=False)
    while True:
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            if len(killed) < len(launcher) and at_step(run, launcher[len(killed)]):
                killed.append(time.time())
                process.kill()
            continue
        if code == 0:
            return killed
        if code != -9:
            print((run.parent / f"{run.name}.log").read_text()[-3000:], file=sys.stderr)
            raise SystemExit(f"the run ended with code {code}")
        process = start(run, epochs, stages, faults, resume=True)


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
        for row in rows(run / "metrics.jsonl")
        if row["event"] == "train"
    ]
    if len(dict(found)) != len(found):
        raise SystemExit("a step is in metrics.jsonl twice")
    return dict(found)


def restart_seconds(run: Path, deaths: list[float]) -> list[float]:
    """From each death to the first step afterwards."""
    begun = [row["time"] for row in rows(run / "metrics.jsonl") if row["event"] == "start"]
    return [min(time_ for time_ in begun if time_ > death) - death for death in deaths if death < begun[-1]]


def main() -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    epochs = max(2, -(-2 * options.kills // STEPS_PER_EPOCH))
    steps = epochs * STEPS_PER_EPOCH
    faults, launcher = draw(options.kills, options.stages, steps, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, run = Path(folder, "undisturbed"), Path(folder, "soak")
        conduct(calm, epochs, options.stages, [], [])
        begin = time.monotonic()
        killed = conduct(run, epochs, options.stages, faults, launcher)
        seconds = time.monotonic() - begin
        deaths = rows(run / "log" / "faults.jsonl")
        victims = Counter(faults[row["fault"]].role for row in deaths) + Counter(launcher=len(killed))
        phases = Counter(str(row["phase"]) for row in deaths)
        pauses = restart_seconds(run, sorted([row["time"] for row in deaths] + killed))
        same_losses = losses(run) == losses(calm)
        left, right = weights(run), weights(calm)
        same_weights = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    print(f"{options.stages} stages, {steps} steps, {sum(victims.values())} kills in {seconds:.0f} s")
    print("victims: " + ", ".join(f"{name} {count}" for name, count in victims.most_common()))
    print("phases: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()))
    print(f"death to training again: median {statistics.median(pauses):.1f} s, longest {max(pauses):.1f} s")
    print(f"losses of all steps and blocks identical: {same_losses}; weights identical: {same_weights}")
    return 0 if same_losses and same_weights else 1


if __name__ == "__main__":
    sys.exit(main())
