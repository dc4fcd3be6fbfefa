"""What a run has written down, also while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Losses = dict[tuple[int, int], dict[str, float]]


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    """The rows of an event in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, whole) if row["event"] == event]


def losses(run: Path) -> Losses:
    """Loss terms by step and block; every step must be there once."""
    found = rows(run, "train")
    terms = {(row["step"], row["block"]): row["terms"] for row in found}
    assert len(terms) == len(found), "a step is there twice"
    return terms


def accuracies(run: Path) -> list[tuple[int, str, float]]:
    """Epoch, split and accuracy of all evaluations, in their order."""
    return [(row["epoch"], row["split"], row["accuracy"]) for row in rows(run, "eval")]
