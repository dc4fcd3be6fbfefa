"""The rows of a run on a real file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.storage.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    found = MetricsLog(tmp_path / "metrics.jsonl")
    yield found
    found.close()


def test_rows_keep_every_bit(log: MetricsLog) -> None:
    values = [0.1 + 0.2, 1e-308, 2.0**-1074, 1 / 3]
    for value in values:
        log.append({"event": "train", "loss": value})
    log.flush()
    assert [row["loss"] for row in log.rows()] == values
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append({"event": "train", "loss": float("nan")})


def test_rows_of_steps_are_written_together_in_their_order_and_others_at_once(log: MetricsLog) -> None:
    reader = MetricsLog(log.path)
    start, *steps = (
        {"event": event, "number": number} for number, event in enumerate(["start", *["train"] * 4])
    )
    log.append(start)
    assert reader.rows() == [start]
    for row in steps[:2]:
        log.append(row)
    assert reader.rows() == [start]
    log.flush()
    assert reader.rows() == [start, *steps[:2]]
    log.append(steps[2])
    log.append({"event": "eval"})
    assert reader.rows() == [start, *steps[:3], {"event": "eval"}]
    log.append(steps[3])
    log.close()
    assert reader.rows()[-1] == steps[3]


def test_rows_that_are_written_again_and_a_row_that_a_crash_cut_off_are_dropped(log: MetricsLog) -> None:
    stay: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "stages": 2},
        {"event": "train", "step": 3, "stage": 1},
        {"event": "eval", "epoch": 0},
        {"event": "checkpoint", "step": 4},
        {"event": "restart", "number": 1},
    ]
    gone: list[dict[str, Any]] = [
        {"event": "train", "step": 4, "stage": 0},
        {"event": "eval", "epoch": 1},
        {"event": "checkpoint", "step": 5},
    ]
    for row in (stay[0], gone[0], stay[1], stay[2], gone[1], stay[3], gone[2], stay[4]):
        log.append(row)
    assert log.last_step() == 3
    with log.path.open("a") as file:
        file.write('{"event": "train", "step": 2, "lo')
    log.rewind(step=4, epoch=1)
    log.append({"event": "train", "step": 4})  # into the new file, though the old one was open
    log.flush()
    assert log.rows() == [*stay, {"event": "train", "step": 4}]


def test_the_last_step_is_that_of_a_group_all_of_whose_stages_have_got_there(log: MetricsLog) -> None:
    def train(step: int, stage: int) -> None:
        log.append({"event": "train", "step": step, "stage": stage})
        log.flush()

    assert log.last_step() == -1
    log.append({"event": "start", "stages": 2})
    train(0, 0)
    assert log.last_step() == -1
    assert log.last_step(frozen=True) == 0
    train(1, 0)
    train(0, 1)
    assert log.last_step() == 0
    log.append({"event": "start", "stages": 1})  # one of them has gone
    assert log.last_step() == 0
    train(1, 0)
    assert log.last_step() == 1
    log.append({"event": "start", "stages": 3})
    train(2, 0)
    train(2, 1)
    assert log.last_step() == 1
    train(2, 2)
    assert log.last_step() == 2
    for step in range(3, 3000):  # the start of the group is far away
        for stage in range(3):
            train(step, stage)
    assert log.last_step() == 2999


def test_two_processes_take_turns(tmp_path: Path) -> None:
    """The launcher adds a row between two starts, and each coordinator replaces the file."""
    launcher, coordinator = (MetricsLog(tmp_path / "metrics.jsonl") for _ in range(2))
    for number in range(3):
        coordinator.rewind(step=0, epoch=0)
        coordinator.append({"event": "start", "number": number})
        coordinator.close()
        launcher.append({"event": "restart", "number": number})
        launcher.close()
    assert len(coordinator.rows()) == 6


def test_a_full_disk_is_reported_by_whoever_meets_it(log: MetricsLog) -> None:
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        log.append({"event": "start"})
    log.append({"event": "train"})
    with pytest.raises(OSError, match="No space left on device"):
        log.flush()
