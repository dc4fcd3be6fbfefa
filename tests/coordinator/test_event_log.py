"""What is kept of a run that failed, and that it suffices to come to the same end again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scpl_dist.coordinator.event_log import KEPT
from scpl_dist.coordinator.events import Commit, NotWritten, Tick
from scpl_dist.run.faults import Fault
from tests.support.conduct import conduct
from tests.support.coordinator import Run, small
from tests.support.replay import replay


def written(run: Run, folder: Path) -> Path:
    path = folder / "events.jsonl"
    path.write_text("\n".join(run.coordinator.log.lines()))
    return path


def test_a_loss_that_is_no_number_is_replayed(tmp_path: Path) -> None:
    run = Run(small(checkpoint__every_steps=1)).start().play(until=lambda item: item.sequence == 3).publish()
    run.done(0)
    run.done(1, losses={"1": {"local": float("nan")}})
    again = replay(written(run, tmp_path))
    assert run.failure.cause == "nonfinite"
    assert again.outcome == run.outcome


def test_a_run_that_went_on_from_a_checkpoint_is_replayed(tmp_path: Path) -> None:
    first = Run(small(checkpoint__every_steps=1)).start().play(until=lambda item: item.sequence == 12)
    position = first.only(Commit)[-1].position
    run = Run(first.config, resume=position, restore="checkpoints/step-3", folder="runs/x", window=3).start()
    run.exited(1, -9)
    run.pass_time(2)
    assert run.failure.cause == "died"
    assert replay(written(run, tmp_path)).outcome == run.outcome


def test_a_real_run_that_failed_is_replayed(tmp_path: Path) -> None:
    ended = conduct(tmp_path / "run", faults=(Fault(action="kill", stage=1, step=3),))
    assert ended.code == 1
    again = replay(ended.run / "log" / "events.jsonl")
    assert again.outcome is not None
    assert again.outcome.failure is not None
    failure, found = again.outcome.failure, ended.exit_json
    assert (found["cause"], found["reason"]) == ("died", failure.message)
    for name in ("stage", "rank", "host", "pid", "phase", "step", "micro_batch"):
        assert found[name] == getattr(failure, name), name
    (start,) = ended.rows("start")
    assert 1 < start["event_number"] < again.number


def test_a_long_run_keeps_its_last_events_only(tmp_path: Path) -> None:
    run = Run().start()
    for _ in range(KEPT):
        run.event(Tick())
    run.event(NotWritten("metrics.jsonl", "no space left"))
    path = written(run, tmp_path)
    _, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert len(rows) == KEPT
    assert rows[-1]["number"] == run.coordinator.number
    event = {"is": "NotWritten", "what": "metrics.jsonl", "message": "no space left", "cause": "disk"}
    assert rows[-1]["event"] == event
    assert [command["is"] for command in rows[-1]["commands"]] == ["Send", "Finish"]
    with pytest.raises(AssertionError, match="does not reach back"):
        replay(path)
