"""The page of a run in a real browser: no errors, no network, and the numbers of result.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.commands import report_data
from scpl_dist.commands.report_page import page
from scpl_dist.run import config as configuration
from scpl_dist.run.faults import Fault
from tests.support.browser import Shown, shown
from tests.support.command import called, scpl_dist
from tests.support.programs import ROOT

OLD = ROOT / "tests" / "storage" / "data" / "run_of_0.1.0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with everything that a report shows."""
    folder = tmp_path_factory.mktemp("report") / "run"
    settings = [
        "run.epochs=2",
        "metrics.port=0",
        "trace.every=1",
        'task.metrics=["confusion"]',
        "checkpoint.every_steps=5",
    ]
    # On a fast machine it would be over before the workers' time is written down a second time.
    longer = Fault(action="delay", stage=0, phase="data", step=12, seconds=1.5)
    options = [word for text in settings for word in ("-o", text)]
    scpl_dist("train", "--run-dir", folder, *options, faults=[longer])
    yield folder
    shutil.rmtree(folder)


def data_in(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_a_browser_shows_the_numbers_of_the_run_without_an_error(run: Path, tmp_path: Path) -> None:
    assert called("report", run).stdout.split() == [str(run / "report.html"), str(run / "report.png")]
    found = shown((run / "report.html").as_uri(), tmp_path)
    assert found.console == []
    result = json.loads((run / "result.json").read_text())
    figures = found.figures()
    assert figures["accuracy_last"] == f"{100 * result['accuracy_last']:.2f} %"
    assert figures["accuracy_best"] == f"{100 * result['accuracy_best']:.2f} %"
    assert figures["steps"] == str(result["steps"])
    assert figures["stages"] == "2"
    assert figures["wall_seconds"] == f"{result['wall_seconds']:.1f} s"
    speed = result["samples_per_second"]
    assert float(figures["samples_per_second"].replace(",", "")) == pytest.approx(
        speed, abs=max(0.5, speed / 2000)
    )
    titles = found.headings()
    assert titles == [
        "Model",
        "Accuracy",
        "Loss",
        "Stages",
        "Time of the stages",
        "Timeline",
        "Confusion",
        "What happened",
        "Settings that differ from the defaults",
    ]
    assert found.text.count("<path") >= 8
    blocks = json.loads((run / "model.json").read_text())["blocks"]
    assert f"{sum(block['parameters'] for block in blocks):,}" in found.text


def test_what_the_page_has_is_what_the_run_has_recorded(run: Path) -> None:
    data = report_data.of_run(run)
    result = json.loads((run / "result.json").read_text())
    assert data["result"] == result
    assert [block["stage"] for block in data["blocks"]] == [0, 0, 1, 1]
    seconds = {
        block: taken for stage in result["per_stage"] for block, taken in stage["block_seconds"].items()
    }
    assert seconds.keys() == {"0", "1", "2", "3"}
    assert all(0 < taken < result["wall_seconds"] for taken in seconds.values())
    assert data["links"] == [{"from": 0, "to": 1, "bytes": result["per_stage"][0]["bytes_sent"]}]
    assert {"run.epochs", "trace.every", "task.metrics"} <= {row[0] for row in data["settings"]}
    assert [mark["kind"] for mark in data["marks"]].count("checkpoint") >= 2
    assert data["confusion"]["epoch"] == 1
    lanes = data["timeline"]["lanes"]
    assert [lane["label"] for lane in lanes] == ["stage 0", "stage 1"]
    assert {len(lane[key]) for lane in lanes for key in "tdpbms"} == {len(lanes[0]["t"]), len(lanes[1]["t"])}
    # A message is taken after it was sent: the spans of two processes are on one clock.
    assert len(data["timeline"]["arrows"]) > result["steps"]
    assert all(sent <= taken for _, _, sent, taken in data["timeline"]["arrows"])


def test_the_trace_of_the_run_has_every_step_of_every_block(run: Path, tmp_path: Path) -> None:
    called("trace", run, "-o", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    backward = {(event["name"], event["args"]["step"]) for event in events if event.get("cat") == "backward"}
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert backward == {(f"backward {block}", step) for block in range(4) for step in range(steps)}
    assert (
        [event["ph"] for event in events].count("s") == [event["ph"] for event in events].count("f") > steps
    )


def test_a_run_of_an_earlier_version_shows_less_and_no_error(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD, tmp_path / "old")
    called("report", folder, tmp_path / "old.html")
    found = shown((tmp_path / "old.html").as_uri(), tmp_path)
    assert found.console == []
    assert "Model" not in found.headings()
    assert "has no trace: train with -o trace.every=1" in found.text
    assert found.figures()["steps"] == str(json.loads((OLD / "result.json").read_text())["steps"])


def test_a_comparison_is_side_by_side(run: Path, tmp_path: Path) -> None:
    for name in ("scpl-seed0", "bp-seed0", "trial-gpipe-2"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "comparison.csv").write_text("method,accuracy,failure\nscpl,98.00,\nbp,97.00,\n")
    (tmp_path / "comparison.md").write_text("vgg_tiny on digits\n\n| method | accuracy % |\n")
    assert called("report", tmp_path).stdout.split() == [str(tmp_path / "report.html")]
    found = shown((tmp_path / "report.html").as_uri(), tmp_path)
    assert found.console == []
    assert [one["name"] for one in data_in((tmp_path / "report.html").read_text())["runs"]] == ["scpl", "bp"]
    assert found.headings()[:3] == ["Table", "Test accuracy", "Test loss"]
    assert found.text.count("<canvas") == 4


def test_a_text_of_the_run_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>console.error('in')</script><b>"
    rows = [
        {"event": "start", "time": 1.0},
        {"event": "warning", "text": evil, "time": 2.0},
        {"event": "train", "step": 0, "epoch": 0, "block": 0, "stage": 0, "loss": 1.0, "time": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path)
    assert data_in(text)["runs"][0]["marks"][0]["text"] == evil
    (tmp_path / "r.html").write_text(text)
    found = shown((tmp_path / "r.html").as_uri(), tmp_path)
    assert found.console == []
    assert "&lt;/script&gt;" in found.text


def test_nothing_is_fetched(run: Path) -> None:
    text = page(run)
    assert not re.search(
        r"""(?:src|href)=["'](?!data:)|url\(|@import|fetch\(|XMLHttpRequest|import\(""", text
    )
    assert "default-src 'none'" in text


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    assert "is no run folder, or its run has not begun" in called("report", tmp_path, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_long_runs_are_thinned_out_and_counters_that_begin_anew_are_no_negative_time() -> None:
    train = [
        {"step": step, "block": 0, "epoch": 0, "loss": float(step % 2), "time": 10.0 + step}
        for step in range(10_000)
    ]
    (block,) = report_data._losses(train, 10.0)
    assert 300 < len(block["points"]) <= report_data.POINTS
    assert {loss for _, _, loss in block["points"][:-1]} <= {0.461538, 0.538462, 0.5}
    assert block["points"][-1][:2] == [9999, 9999.0]
    rows = [
        {
            "event": "usage",
            "time": 10.0 + at,
            "workers": [
                {
                    "rank": 0,
                    "busy": busy,
                    "waiting": 0.0,
                    "blocked": 0.0,
                    "bytes_sent": 10 * busy,
                    "peak_memory": 1,
                }
            ],
        }
        for at, busy in ((1, 1.0), (2, 1.5), (4, 0.5))
    ]
    assert report_data._usage(rows, [0], 10.0) == [
        [2.0, [[0.5, 0.0, 0.0, 5, 1]]],
        [4.0, [[0.5, 0.0, 0.0, 2, 1]]],
    ]


def test_settings_are_those_that_were_changed() -> None:
    config = configuration.load(values={"optimizer.lr": 0.5, "model.args": {"width": 2}})
    found = report_data._settings(config)
    assert [row[:3] for row in found] == [
        ["model.args", '{"width": 2}', "{}"],
        ["optimizer.lr", "0.5", "0.002"],
    ]
    assert "learning rate" in found[1][3]


def test_the_page_looks_the_same_with_less_room_and_in_the_dark(run: Path, tmp_path: Path) -> None:
    called("report", run, tmp_path / "r.html")
    for dark, width in ((False, 420), (True, 1280)):
        found: Shown = shown((tmp_path / "r.html").as_uri(), tmp_path, dark=dark, width=width)
        assert found.console == []
        assert found.colour() == ((20, 24, 28) if dark else (255, 255, 255))
