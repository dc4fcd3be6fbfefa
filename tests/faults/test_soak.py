"""A short soak; the long one is a script, its result is in docs/reliability.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.soak import draw
from tests.support.programs import ROOT, run

SEED = 24  # its kills hit a stage, the coordinator and the launcher


@pytest.mark.timeout(900)
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    faults, launcher = draw(kills=3, stages=2, steps=10, seed=SEED)
    assert {fault.role for fault in faults} == {"worker", "coordinator"}
    assert launcher
    command = (sys.executable, "benchmarks/soak.py", "--kills", 3, "--seed", SEED)
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run(*command, cwd=ROOT, env=environment, code=0, limit_s=800)
    assert "2 stages, 10 steps, 3 kills" in done.stdout
    assert "losses of all steps and blocks identical: True; weights identical: True" in done.stdout
