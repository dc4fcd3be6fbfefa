"""Real runs that end when they no longer get better, and one that goes on for more epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scpl_dist
from scpl_dist.storage.run_folder import RunFolder
from tests.support.command import scpl_dist as command

STUCK = ["optimizer.lr=1e-12", "optimizer.end_lr=0", "run.patience=1", "run.epochs=9", "data.batch_size=256"]
JUDGED = ["task.metrics=['macro_f1','top5']", "task.class_weights=balanced", "task.label_smoothing=0.1"]


def train(run: Path, *settings: str, resume: str = "never") -> str:
    overrides = [part for text in ("metrics.port=0", *settings) for part in ("-o", text)]
    return command("train", "--run-dir", run, "--resume", resume, *overrides).stderr


def evaluations(run: Path) -> list[dict[str, Any]]:
    rows = [row for row in RunFolder(run).metrics.rows() if row["event"] == "eval"]
    return [{key: value for key, value in row.items() if key not in ("time", "event_number")} for row in rows]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(run, *STUCK, *JUDGED, "pipeline.stages=1")
    return run


def test_a_run_stops_at_the_same_step_with_any_number_of_stages(stopped: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *STUCK, *JUDGED, "pipeline.stages=3")
    assert evaluations(tmp_path / "run") == evaluations(stopped)
    for run in (stopped, tmp_path / "run"):
        result = RunFolder(run).read("result.json") or {}
        assert (result["stopped_early"], result["epochs"], result["steps"]) == (True, 2, 10)
        assert [path.name for path in (run / "checkpoints").glob("step-*")].count("step-10") == 1


def test_evaluate_finds_what_the_run_has_found(stopped: Path) -> None:
    (last,) = (row for row in evaluations(stopped) if (row["epoch"], row["split"]) == (1, "test"))
    found = scpl_dist.evaluate(stopped)
    assert sum(found["correct"]) == last["correct"]
    for key in ("accuracy", "loss", "macro_f1", "top5", "total"):
        assert found[key] == last[key], key
    assert (RunFolder(stopped).read("result.json") or {})["metrics"]["test"]["loss"] == last["loss"]


def test_a_run_goes_on_for_more_epochs_and_says_what_becomes_of_its_schedule(stopped: Path) -> None:
    before = evaluations(stopped)
    said = train(stopped, "run.patience=0", "run.epochs=3", resume="auto")
    assert "run.epochs = 9, now 3" in said
    assert (
        "the schedule is that of 3 epochs from the beginning, of which 2 are done: the learning rate may jump"
        in said
    )
    assert evaluations(stopped)[: len(before)] == before
    result = RunFolder(stopped).read("result.json") or {}
    assert (result["stopped_early"], result["epochs"], result["steps"]) == (False, 3, 15)
