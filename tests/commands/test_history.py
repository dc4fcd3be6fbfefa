"""The way of a run as rows, from what it has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scpl_dist.commands.history import History, RunResult
from tests.support.programs import ROOT
from tests.support.run_folder import rows

RUN = ROOT / "tests" / "storage" / "data" / "run_of_0.1.0"


def test_each_step_has_the_losses_of_its_blocks_and_each_epoch_what_was_measured() -> None:
    found = History.read(RUN)
    losses = {(row["step"], row["block"]): row["loss"] for row in rows(RUN, "train")}
    assert [row["step"] for row in found.steps] == list(range(40))
    assert {(row["step"], block): row[f"loss_{block}"] for row in found.steps for block in range(3)} == losses
    assert [row["epoch"] for row in found.steps] == [step // 10 for step in range(40)]
    assert [row["epoch"] for row in found.epochs] == [0, 1, 2, 3]
    for split in ("validation", "test"):
        accuracies = [row["accuracy"] for row in rows(RUN, "eval") if row["split"] == split]
        assert [row[f"{split}_accuracy"] for row in found.epochs] == accuracies
    seconds = [row["seconds"] for row in (*found.steps, *found.epochs)]
    assert all(isinstance(value, float) and value > 0 for value in seconds)


def test_a_result_is_its_file_with_the_folder_and_the_way_to_it() -> None:
    result = RunResult({**json.loads((RUN / "result.json").read_text()), "run_dir": str(RUN)})
    assert result["accuracy_last"] == result.history.epochs[-1]["test_accuracy"]
    assert result.run_dir == RUN


def test_a_run_that_has_not_begun_has_no_rows(tmp_path: Path) -> None:
    assert History.read(tmp_path) == History([], [])


def test_what_is_no_single_number_is_left_out(tmp_path: Path) -> None:
    row = {"event": "eval", "epoch": 0, "split": "test", "accuracy": 0.5, "confusion": [[1, 0], [0, 1]]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert History.read(tmp_path).epochs == [
        {"epoch": 0, "seconds": None, "test_accuracy": pytest.approx(0.5)}
    ]
