"""Whole runs over each transport and each type on the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.run.config import load
from scpl_dist.run.faults import Fault
from tests.support import reference
from tests.support.command import scpl_dist
from tests.support.conduct import SMALL, conduct
from tests.support.run_folder import Losses, losses

SETTINGS = ["run.epochs=1", "data.batch_size=256", "metrics.port=0", "pipeline.stages=3"]


def run(folder: Path, *settings: str) -> tuple[Losses, dict[str, Any]]:
    """Losses by (step, block), and the content of result.json."""
    overrides = [part for text in (*SETTINGS, *settings) for part in ("-o", text)]
    scpl_dist("train", "--run-dir", folder, *overrides)
    return losses(folder), json.loads((folder / "result.json").read_text())


TEXTS = ["task.name=lm", "data.name=text_lm", "data.args={length=16, limit=12000}", "data.batch_size=48"]
TEXTS += ["model.name=gpt", "model.args={width=16, layers=4, heads=2}", "pipeline.micro_batches=3"]


@pytest.mark.parametrize(
    "settings",
    [[], ["run.method=gpipe", "pipeline.micro_batches=3"], TEXTS],
    ids=["scpl", "gpipe", "micro-batches of tokens"],
)
def test_gloo_equals_a_plain_loop(settings: list[str], tmp_path: Path) -> None:
    found, _ = run(tmp_path / "run", "pipeline.transport=gloo", *settings)
    assert found == reference.train(load(None, [*SETTINGS, *settings])).losses


def test_a_narrow_wire_sends_fewer_bytes_and_rounds_only_what_travels(tmp_path: Path) -> None:
    wide, full = run(tmp_path / "wide", "pipeline.transport=gloo")
    for wire, transport, share in (("bfloat16", "gloo", 0.5), ("int8", "rpc", 0.25)):
        settings = [f"pipeline.transport={transport}", f"pipeline.wire_dtype={wire}"]
        narrow, result = run(tmp_path / wire, *settings)
        assert narrow == reference.train(load(None, [*SETTINGS, *settings])).losses
        assert narrow[0, 0] == wide[0, 0]  # block 0 sees no wire
        assert all(abs(narrow[0, 3][name] - value) < 0.05 * abs(value) for name, value in wide[0, 3].items())
        sent = [one["per_stage"][0]["bytes_sent"] for one in (full, result)]
        assert share <= sent[1] / sent[0] < 1.01 * share + 0.25 / 16  # scales of at most 64 values each


def test_a_worker_that_is_replaced_gets_what_the_narrow_wire_rounded_before(tmp_path: Path) -> None:
    settings = [
        "pipeline.stages=2",
        "pipeline.wire_dtype=int8",
        "checkpoint.every_steps=2",
        "runtime.max_restarts=1",
    ]
    fault = Fault(action="kill", stage=1, step=3, phase="backward")
    ended = conduct(tmp_path / "run", *SETTINGS, *settings, faults=(fault,))
    assert ended.code == 0, ended.screen
    assert len(ended.rows("restart")) == 1
    assert ended.losses() == reference.train(load(None, [*SMALL, *SETTINGS, *settings])).losses
