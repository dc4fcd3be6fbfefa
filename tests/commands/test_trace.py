"""The trace of a run, for viewers of Chrome's format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.commands import timeline
from scpl_dist.run.phases import Phase
from scpl_dist.storage import spans
from scpl_dist.storage.spans import RECORD, SENT, TAKEN
from tests.support.command import called

FORWARD, SEND, RECEIVE = (spans.PHASES.index(phase) for phase in (Phase.FORWARD, Phase.SEND, Phase.RECEIVE))


def record(run: Path, boots: tuple[str, str], monkeypatch: pytest.MonkeyPatch, shift: float = 0.0) -> None:
    """Two stages on two machines, whose clocks differ; a message takes 2 ms from one to the other."""
    of_both = (
        [(1.0, 1.1, 5, 5, 0, 0, FORWARD), (1.1, 1.2, 5, 5, -1, 0, SEND), (1.15, 1.15, 9, 1, 0, 0, SENT)],
        [
            (1.1, 1.2, 5, 5, -1, 0, RECEIVE),
            (1.152, 1.152, 9, 0, 0, 0, TAKEN),
            (1.2, 1.4, 5, 5, 1, 0, FORWARD),
        ],
    )
    for stage, (boot, records) in enumerate(zip(boots, of_both, strict=True)):
        monkeypatch.setattr(spans, "boot", lambda boot=boot: boot)
        whose = {"rank": stage, "stage": stage, "replica": 0, "host": f"host{stage}", "generation": "g"}
        with spans.create(run / "log", f"stage{stage}", whose) as file:
            for begin, end, *rest in records:
                file.write(RECORD.pack(begin + shift * stage, end + shift * stage, *rest))


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def test_stages_are_on_one_clock_and_arrows_lead_from_send_to_receive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, ("a", "b"), monkeypatch, shift=500.0)
    rows = [
        {"event": "clock", "at": at, "offsets": {"0": [0.0, 0.001], "1": [-500.0, 0.003]}}
        for at in (0.0, 9.0)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = called("trace", tmp_path).stdout
    assert out == f"{tmp_path / 'trace.json.gz'}: 4 spans of 2 workers; clocks of the hosts agree to 3 ms\n"
    found = events(tmp_path / "trace.json.gz")
    assert [
        (event["name"], event["pid"], event["ts"], event["dur"]) for event in found if event["ph"] == "X"
    ] == [
        ("forward 0", 0, 0.0, pytest.approx(1e5)),
        ("send", 0, 1e5, pytest.approx(1e5)),
        ("receive", 1, 1e5, pytest.approx(1e5)),
        ("forward 1", 1, 2e5, pytest.approx(2e5)),
    ]
    flow = {event["ph"]: event for event in found if event["ph"] in "sf"}
    assert flow["s"]["id"] == flow["f"]["id"]
    assert (flow["s"]["pid"], flow["s"]["ts"], flow["f"]["pid"], flow["f"]["ts"]) == (
        0,
        150000.0,
        1,
        152000.0,
    )
    assert [event["args"]["name"] for event in found if event["name"] == "process_name"] == [
        "stage 0 on host0",
        "stage 1 on host1",
    ]


def test_one_machine_has_one_clock_and_needs_no_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, ("a", "a"), monkeypatch)
    assert "one host, one clock" in called("trace", tmp_path, "-o", tmp_path / "t.json").stdout
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["clock_error_us"] == 0


def test_an_offset_that_changes_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, ("a", "b"), monkeypatch)
    rows = [
        {"event": "clock", "at": at, "offsets": {"0": [0.0, 0.0], "1": [drift, 0.0]}}
        for at, drift in ((1.0, 0.0), (2.0, 0.1))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lane = timeline.lanes(tmp_path)[1]
    assert lane.shifted(0.5) == 0.5
    assert lane.shifted(1.45) == pytest.approx(1.5)
    assert lane.shifted(3.0) == pytest.approx(3.1)


def test_what_was_not_recorded_is_said_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "train with -o trace.every=1" in called("trace", tmp_path, code=2).stderr
    record(tmp_path, ("a", "b"), monkeypatch)
    assert "was never compared" in called("trace", tmp_path, code=2).stderr
