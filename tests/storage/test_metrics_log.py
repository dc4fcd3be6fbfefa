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
        log.append({"loss": value})
    assert [row["loss"] for row in log.rows()] == values
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append({"loss": float("nan")})


def test_a_row_is_in_the_file_when_append_returns(log: MetricsLog) -> None:
    for number in range(3):
        log.append({"number": number})
        assert len(MetricsLog(log.path).rows()) == number + 1


def test_rows_that_are_written_again_and_a_row_that_a_crash_cut_off_are_dropped(log: MetricsLog) -> None:
    stay: list[dict[str, Any]] = [
        {"event": "start", "step": 0},
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
    assert log.last_step(stages=2) == 3
    assert log.last_step(stages=3) == -1
    with log.path.open("a") as file:
        file.write('{"event": "train", "step": 2, "lo')
    log.rewind(step=4, epoch=1)
    log.append({"event": "train", "step": 4})  # into the new file, though the old one was open
    assert log.rows() == [*stay, {"event": "train", "step": 4}]


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


def test_a_full_disk_is_reported_by_the_row_that_meets_it(log: MetricsLog) -> None:
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        log.append({"event": "start"})
