"""Checkpoints on their way: published in order, dropped if nobody needs them, missed if a disk does not answer."""

from __future__ import annotations

from typing import Any

from scpl_dist.control.messages import File, Hello, Written
from scpl_dist.coordinator.events import Commit, Discard
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.members import Member
from scpl_dist.coordinator.pending_checkpoints import PendingCheckpoints
from scpl_dist.run import config as configuration
from scpl_dist.run.layout import Layout
from tests.support.invariants import check_checkpoints

CONFIG = configuration.load(values={"runtime.timeout_s": 10.0, "runtime.first_step_timeout_s": 30.0})
PART = File(name="block-000.pt", bytes=5, sha256="0" * 64)


def sequence() -> ItemSequence:
    return ItemSequence(CONFIG, {"train": 256, "validation": 10, "test": 10})


def pending() -> PendingCheckpoints:
    return PendingCheckpoints(sequence(), stages=2)


def copied(found: PendingCheckpoints, number: int, now: float = 0.0, **commit: Any) -> None:
    """Both stages have copied their state, and the marker has left the pipeline."""
    for stage in (0, 1):
        found.copied(stage, number, now)
    found.complete(number, Commit(10 * number, 0, {}, unique=f"g-{number}", **commit))
    check_checkpoints(found)


def written(found: PendingCheckpoints, number: int, *stages: int) -> None:
    for stage in stages:
        message = Written(sequence=number, files=[PART], seconds=1.0 + stage)
        assert found.written(stage, message, begun=False)
        check_checkpoints(found)


def members() -> dict[int, Member]:
    fields: dict[str, Any] = {"protocol": 1, "version": "1", "torch": "2", "config": "c"}
    fields |= {"host": "h", "device": "cpu"}
    layout = Layout([1, 1])
    hellos = [Hello(**fields, rank=rank, pid=100 + rank) for rank in (0, 1)]
    return {
        rank: Member(b"p", hello, heard=0.0, changed=0.0, worker=layout.workers[rank])
        for rank, hello in enumerate(hellos)
    }


def test_a_checkpoint_waits_for_all_parts_and_for_those_before_it() -> None:
    found = pending()
    copied(found, 1)
    copied(found, 2)
    written(found, 2, 0, 1)
    written(found, 1, 1)
    assert found.take(0.0) == []
    written(found, 1, 0)
    first, second = found.take(0.0)
    assert isinstance(first, Commit)
    assert isinstance(second, Commit)
    assert (first.step, second.step) == (10, 20)
    assert [file["stage"] for file in first.files] == [0, 1]
    assert first.seconds == 2.0
    assert found.pending
    found.published(10)
    found.published(20)
    assert not found.pending


def test_a_part_that_nobody_awaits_is_no_part() -> None:
    found = pending()
    message = Written(sequence=1, files=[PART], seconds=1.0)
    assert not found.written(0, message, begun=False)
    copied(found, 1)
    assert found.written(0, message, begun=True)
    assert not found.written(0, message, begun=True)


def test_what_is_neither_due_nor_the_best_is_dropped_unless_the_run_ends_there() -> None:
    items = sequence()
    found = PendingCheckpoints(items, stages=2)
    for number, flags in ((1, {"due": False}), (2, {"due": False, "best": True}), (3, {"due": True})):
        copied(found, number, **flags)
        written(found, number, 0, 1)
    assert [(type(command), command.step) for command in found.take(0.0)] == [
        (Discard, 10),
        (Commit, 20),
        (Commit, 30),
    ]
    items.stop()
    copied(found, 4, due=False)
    written(found, 4, 0, 1)
    assert isinstance(found.take(0.0)[0], Commit)


def test_a_slow_disk_is_a_failure_with_a_longer_limit_for_the_first_time() -> None:
    found = pending()
    copied(found, 1, now=100.0)
    written(found, 1, 0)
    assert found.late(members(), CONFIG, 129.9) is None
    failure = found.late(members(), CONFIG, 130.0)
    assert failure is not None
    assert (failure.cause, failure.stage, failure.pid) == ("hang", 1, 101)
    written(found, 1, 1)
    found.take(130.0)
    assert found.unpublished(CONFIG, 139.9) is None
    failure = found.unpublished(CONFIG, 140.0)
    assert failure is not None
    assert "publishing the checkpoint of step 10 has taken 10.0 s" in failure.message
    found.published(10)
    copied(found, 2, now=200.0)
    assert found.late(members(), CONFIG, 209.9) is None
    assert found.late(members(), CONFIG, 210.0) is not None
