"""Runs whose blocks are away while others compute: lost workers, other stages, and memory for a part of the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support import dense, programs
from tests.support.conduct import Ended, conduct, same
from tests.support.faults import fired

pytestmark = pytest.mark.timeout(300)

AWAY = ("runtime.offload=disk", "checkpoint.every_steps=2")


def test_a_worker_that_is_lost_is_replaced(undisturbed: Ended, tmp_path: Path) -> None:
    kill = Fault(action="kill", stage=1, step=7, phase="backward")
    ended = conduct(tmp_path / "run", *AWAY, "runtime.max_restarts=1", faults=(kill,))
    same(ended, undisturbed)
    assert len(ended.rows("restart")) == 1


def test_a_run_goes_on_with_blocks_away_and_its_stages_share_those_of_a_lost_one(
    undisturbed: Ended, tmp_path: Path
) -> None:
    faults = (
        Fault(action="kill", stage=0, step=5, phase="forward"),
        Fault(action="kill", stage=1, step=11, phase="offload"),
    )
    failed = conduct(tmp_path / "run", "checkpoint.every_steps=2", faults=faults)
    assert failed.code == 1
    shape = ("pipeline.stages=3", "pipeline.elastic=[1,3]")
    ended = conduct(tmp_path / "run", *AWAY, *shape, faults=faults, options=("--resume", "auto"))
    same(ended, undisturbed)
    assert len(fired(ended.run)) == 2


def test_replicas_whose_blocks_are_away_come_to_the_same(tmp_path: Path) -> None:
    plain = conduct(tmp_path / "plain", "pipeline.replicas=[1,2]")
    assert plain.code == 0, plain.screen
    same(conduct(tmp_path / "away", "pipeline.replicas=[1,2]", *AWAY), plain)


def test_a_full_disk_for_blocks_that_are_away_is_named(tmp_path: Path) -> None:
    programs.need_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    programs.run("mount", "-t", "tmpfs", "-o", "size=200k", "none", disk, code=0)
    try:
        ended = conduct(tmp_path / "run", *AWAY, f"runtime.offload_folder={disk}", "runtime.max_restarts=0")
    finally:
        programs.run("umount", disk, code=0)
    assert ended.code == 1, ended.screen
    assert ended.exit_json["cause"] == "disk"
    assert (
        f"No space left on device, where runtime.offload keeps blocks that are away: '{disk}'" in ended.screen
    )
    assert "another --run-dir (runtime.offload_folder" in ended.exit_json["advice"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_of_four_times_the_memory_trains(tmp_path: Path) -> None:
    depth, width, room = 32, 1024, 120_000_000  # in which not even the weights find room
    learned = depth * width * width * 4 * 4  # float32 weights, gradients, and two states of Adam
    assert learned > 4 * room
    settings = (
        *dense.settings(depth, width, room),
        "run.method=early_exit",
        "loss.classifier=l",
        "run.epochs=1",
        "data.batch_size=512",
        "pipeline.stages=1",
    )
    without = conduct(tmp_path / "without", *settings)
    assert without.code == 1
    assert "Cannot allocate memory" in without.exit_json["reason"], without.exit_json
    ended = conduct(tmp_path / "run", *settings, "runtime.offload=disk")
    assert ended.code == 0, ended.screen
    assert len(ended.rows("train")) == 3 * depth
