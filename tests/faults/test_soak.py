"""A short soak; the long one is a script, its result is in docs/elastic.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.programs import ROOT, run


@pytest.mark.timeout(900)
def test_random_events_change_nothing(tmp_path: Path) -> None:
    command = (sys.executable, "benchmarks/soak.py", "--events", 8, "--seed", 1)
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run(*command, cwd=ROOT, env=environment, code=0, limit_s=800)
    assert "blocks moved" in done.stdout
    assert "blocks moved 0 times" not in done.stdout
    assert "left over: nothing" in done.stdout
    assert "losses of all steps and blocks identical: True; weights identical: True" in done.stdout
