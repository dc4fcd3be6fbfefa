from __future__ import annotations

import csv
from pathlib import Path

import pytest

from scpl_dist.commands import report
from scpl_dist.commands.compare import COLUMNS, Comparison, Entry, own_settings
from scpl_dist.plan.forecast import cores
from scpl_dist.run.config import Loss, load
from tests.support.command import called, scpl_dist


def result(accuracy: float, speed: float, busy: float = 3.0) -> dict[str, object]:
    stage = {"busy_seconds": busy, "waiting_seconds": 1.0, "blocked_seconds": 0.0, "bytes_sent": 500_000}
    return {
        "accuracy_last": accuracy,
        "accuracy_best": accuracy,
        "samples_per_second": speed,
        "wall_seconds": 4.0,
        "steps": 2,
        "per_stage": [stage | {"peak_memory_bytes": 5_000_000}, stage | {"peak_memory_bytes": 7_000_000}],
    }


def test_a_row_has_spread_and_speed_relative_to_the_three_references(tmp_path: Path) -> None:
    entries = [
        Entry("scpl", [], [result(0.9, 300), result(0.8, 500)], parameters=(1000, 1500)),
        Entry("bp", [], [result(0.9, 100)]),
        Entry("al", [], failure="no luck"),
        Entry("bp, one process", [], [result(0.9, 200)]),
        Entry("gpipe, 4 parts", [], [result(0.9, 160)]),
    ]
    comparison = Comparison(tmp_path, entries, "note")
    comparison.write()
    with (tmp_path / "comparison.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    wanted = {
        "accuracy": "85.00 +- 7.07",
        "samples_per_second": "400",
        "speedup_one": "2.00",
        "speedup_bp": "4.00",
        "speedup_gpipe": "2.50",
        "busy": "75 to 75",
        "bytes_per_step": "0.50",
        "peak_memory": "7",
        "with_heads": "1,500",
    }
    assert {key: rows["scpl"][key] for key in wanted} == wanted
    assert (rows["al"]["accuracy"], rows["al"]["failure"]) == ("failed", "no luck")
    markdown = (tmp_path / "comparison.md").read_text()
    assert all(heading in markdown for heading in COLUMNS.values())
    assert "al failed: no luck" in markdown


@pytest.mark.timeout(420)
def test_methods_are_compared_and_a_failure_is_a_row(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    # A block that early_exit's classifier cannot read, but that trains with back-propagation.
    model.write_text(MODEL)
    folder = tmp_path / "out"
    small = [
        "model.name",
        f"{model}:blocks",
        "run.epochs",
        "1",
        "data.batch_size",
        "512",
        "data.augmentation",
        "none",
    ]
    overrides = [x for k, v in zip(small[::2], small[1::2], strict=True) for x in ("-o", f"{k}={v}")]
    arguments = [
        "--methods",
        "early_exit,gpipe",
        "--micro-batches",
        "2",
        "--run-dir",
        str(folder),
        *overrides,
    ]
    done = scpl_dist("compare", *arguments, timeout_s=400)
    with (folder / "comparison.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["early_exit", "bp, one process", "gpipe, 2 parts"]
    assert "not here" in rows["early_exit"]["failure"]
    assert rows["early_exit"]["accuracy"] == "failed"
    for label in ("bp, one process", "gpipe, 2 parts"):
        assert float(rows[label]["accuracy"]) >= 0
        assert rows[label]["failure"] == ""
        assert float(rows[label]["speedup_one"]) >= 0
    assert rows["gpipe, 2 parts"]["parameters"] == f"{256 * 8 + 8 + 8 * 8 + 8:,}"
    assert rows["gpipe, 2 parts"]["with_heads"] == f"{256 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10:,}"
    assert {label: row["threads"] for label, row in rows.items()} == {
        "early_exit": "2 x 1",
        "bp, one process": f"1 x {min(2, cores())}",
        "gpipe, 2 parts": "2 x 1",
    }
    assert (folder / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "early_exit" in done.stdout
    picture = report.report(folder / "gpipe-2-parts-seed0")
    assert picture.read_bytes()[:4] == b"\x89PNG"


MODEL = """
import torch
from torch import nn

class Block(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).tanh()

    @property
    def classifier(self):
        raise RuntimeError("not here")

def blocks(classes):
    return [Block(256, 8), Block(8, 8)]
"""


def test_a_shared_setting_is_taken_back_for_a_method_that_does_not_read_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ["loss.temperature=0.2", "loss.args.weight=1"]
    base = load(None, shared)
    assert own_settings("scpl", base) == ["run.method=scpl"]
    assert load(None, [*shared, *own_settings("bp", base)]).loss == Loss()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: loss.args, loss.temperature: not for the method bp")


def test_what_only_a_schedule_with_micro_batches_has_is_taken_back_for_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ["pipeline.schedule=1f1b", "pipeline.deferred_batch_norm=true", "pipeline.recompute=true"]
    base = load(None, shared)
    assert own_settings("gpipe", base) == ["run.method=gpipe"]
    for method in ("scpl", "bp"):
        taken = load(None, [*shared, *own_settings(method, base)]).pipeline
        assert (taken.schedule, taken.deferred_batch_norm, taken.recompute) == ("gpipe", False, True)
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(
            "warning: pipeline.schedule, pipeline.deferred_batch_norm: not for the method"
        )


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        report.report(tmp_path)


def test_unknown_methods_and_numbers_are_refused() -> None:
    assert "run.method = 'nothing': unknown" in called("compare", "--methods", "scpl,nothing", code=2).stderr
    assert "--micro-batches 'x'" in called("compare", "--micro-batches", "x", code=2).stderr
