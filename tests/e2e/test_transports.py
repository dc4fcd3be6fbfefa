"""Whole runs over each transport and each type on the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import scpl_dist
from tests.support.run_folder import Losses, losses

SETTINGS = ["run.epochs=1", "data.batch_size=256", "metrics.port=0", "pipeline.stages=3"]


def run(folder: Path, *settings: str) -> tuple[Losses, dict[str, Any]]:
    """Losses by (step, block), and the content of result.json."""
    overrides = [part for text in (*SETTINGS, *settings) for part in ("-o", text)]
    scpl_dist("train", "--run-dir", folder, *overrides)
    return losses(folder), json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "settings", [[], ["run.method=gpipe", "pipeline.micro_batches=3"]], ids=["scpl", "gpipe"]
)
def test_gloo_equals_a_plain_loop(settings: list[str], tmp_path: Path) -> None:
    found, _ = run(tmp_path / "run", "pipeline.transport=gloo", *settings)
    assert found == reference.train(load(None, [*SETTINGS, *settings])).losses


def test_a_narrow_wire_sends_half_the_bytes_and_rounds_only_what_travels(tmp_path: Path) -> None:
    wide, full = run(tmp_path / "wide", "pipeline.transport=gloo")
    for transport in ("gloo", "rpc"):
        narrow, half = run(
            tmp_path / transport, f"pipeline.transport={transport}", "pipeline.wire_dtype=bfloat16"
        )
        assert narrow[0, 0] == wide[0, 0]  # block 0 sees no wire
        assert narrow[0, 3] != wide[0, 3]
        assert all(abs(narrow[0, 3][name] - value) < 0.05 * abs(value) for name, value in wide[0, 3].items())
        sent = [result["per_stage"][0]["bytes_sent"] for result in (full, half)]
        assert 0.5 <= sent[1] / sent[0] < 0.51
