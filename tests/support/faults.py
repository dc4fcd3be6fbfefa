"""Failures on purpose: how a test asks for them, and what it finds noted afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scpl_dist.run.faults import VARIABLE, Fault


def encode(*faults: Fault) -> dict[str, str]:
    """The environment that makes these faults happen."""
    return {VARIABLE: json.dumps([fault.model_dump(exclude_none=True) for fault in faults])} if faults else {}


def fired(run_dir: Path) -> list[dict[str, Any]]:
    """What has happened in a run so far: index of the fault, place, process and wall time."""
    path = run_dir / "log" / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
