"""SIGKILL in every phase of a worker's and of the coordinator's life: the others live, and no bit changes.

A run is killed again and again, in another phase each time, so that the many kills cost one start.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.run.faults import Fault
from tests.support.conduct import Ended, Running, conduct, same
from tests.support.faults import fired

pytestmark = pytest.mark.timeout(600)

LONG = "run.epochs=10"  # 50 steps
SETTINGS = ("checkpoint.every_steps=2", "pipeline.stages=3", "runtime.max_restarts=30")
BUSY = ("forward", "loss", "backward", "optimizer")
SAVING = ("evaluate", "checkpoint", "write", "written")
PHASES = {
    0: ("loading", "data", *BUSY, "room", "send", *SAVING),
    1: ("loading", "receive", *BUSY, "room", "send", *SAVING),
    2: ("loading", "receive", *BUSY, *SAVING),
}
"""Of the first, a middle and the last stage; before "written" a part of a checkpoint is on disk, before "write" not."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return conduct(tmp_path_factory.mktemp("calm") / "run", LONG, "pipeline.stages=1")


@pytest.mark.parametrize("stage", PHASES)
def test_a_worker_that_dies_in_any_phase_is_replaced_and_the_others_stay(
    stage: int, calm: Ended, tmp_path: Path
) -> None:
    # So far apart that all stages have come further in between: otherwise it is one failure that comes again.
    faults = [
        Fault(action="kill", stage=stage, step=number * 4, phase=phase)
        for number, phase in enumerate(PHASES[stage])
    ]
    others = {str(other) for other in PHASES if other != stage} | {"coordinator", "launcher"}
    with Running(tmp_path / "run", *SETTINGS, LONG, faults=tuple(faults)) as running:
        pids = running.pids(*others)
        ended = running.end()
    same(ended, calm)
    assert sorted(row["fault"] for row in fired(ended.run)) == list(range(len(faults)))
    assert {role: len(found) for role, found in pids.items()} == dict.fromkeys(others, 1)
    assert len(ended.rows("restart")) == len(faults)


def test_who_dies_while_a_group_is_formed_is_replaced_as_well(undisturbed: Ended, tmp_path: Path) -> None:
    faults = (
        Fault(
            action="kill", stage=0, phase="joining"
        ),  # in a call that nothing but their end gets the others out of
        Fault(action="kill", stage=1, step=4, phase="forward"),
        Fault(action="kill", stage=2, step=4, phase="starting"),  # a survivor of that, in the next group
        Fault(action="kill", stage=1, step=10, phase="optimizer"),
        Fault(action="kill", stage=0, step=10, phase="idle"),  # free, and in no group
    )
    ended = conduct(tmp_path / "run", *SETTINGS, faults=faults)
    same(ended, undisturbed)
    assert sorted(row["fault"] for row in fired(ended.run)) == [0, 1, 2, 3, 4]


def test_a_coordinator_that_dies_in_any_state_is_started_again(undisturbed: Ended, tmp_path: Path) -> None:
    places = [
        ("gathering", 0),
        ("joining", 0),
        ("commit", 2),
        ("committed", 4),
        ("running", 7),
        ("regrouping", 12),
        ("commit", 16),
    ]
    faults = [Fault(action="kill", role="coordinator", step=step, phase=phase) for phase, step in places]
    faults.append(Fault(action="kill", stage=1, step=12, phase="backward"))  # or else nobody regroups
    ended = conduct(tmp_path / "run", *SETTINGS, faults=tuple(faults))
    same(ended, undisturbed)
    assert sorted(row["fault"] for row in fired(ended.run)) == list(range(len(faults)))
