"""Who is there, who may come, and whose end is no news."""

from __future__ import annotations

from typing import Any

from scpl_dist.control.messages import PROTOCOL, VERSION, Hello
from scpl_dist.coordinator.members import Member, blame
from scpl_dist.coordinator.roster import Roster
from scpl_dist.run.failures import Cause
from tests.support.coordinator import small


def member(pid: int, rank: int | None = None, **changes: Any) -> Member:
    fields: dict[str, Any] = {"protocol": PROTOCOL, "version": VERSION, "torch": "2.14.1"}
    fields |= {"config": small().digest(), "rank": rank, "host": "here", "pid": pid, "device": "cpu"}
    return Member(b"%d" % pid, Hello(**fields | changes), 0.0, 0.0)


def roster_of(count: int, **values: Any) -> Roster:
    roster = Roster(small(**values))
    for rank in range(count):
        roster.admit(member(100 + rank, rank))
    return roster


def test_a_worker_must_equal_those_of_the_first_group_also_when_they_are_all_gone() -> None:
    roster = roster_of(3)
    others = [*roster.present.values()]
    roster.settle(others[0])
    for other in others:
        roster.drop(other)
    assert roster.objection(member(200, 0).hello) is None
    text = "torch version of this worker is 3, the run has 2.14.1"
    assert roster.objection(member(200, 0, torch="3").hello) == text


def test_there_is_room_for_one_more_than_needed_while_a_loss_may_be_survived() -> None:
    roster = roster_of(3)
    assert roster.no_room(budget=0) == "all 3 places are taken"
    assert roster.no_room(budget=1) is None
    roster.admit(member(200))
    assert roster.no_room(budget=1) == "all 3 places are taken"
    assert roster_of(3, pipeline__elastic=[1, 4]).no_room(budget=0) is None
    assert roster_of(4, pipeline__elastic=[1, 4]).no_room(budget=0) == "all 4 places are taken"


def test_a_worker_is_known_by_rank_and_process_and_a_culprit_by_host_and_process() -> None:
    roster = Roster(small())
    here, there = member(7, 0), member(7, 1, host="there")
    there.peer = b"other"
    roster.admit(here)
    roster.admit(there)
    assert roster.started(1, 7) is there
    assert roster.started(0, 7) is here
    assert roster.started(2, 7) is None
    assert roster.culprit(blame(there, Cause.DIED, "gone")) is there


def test_the_end_of_whoever_was_dropped_or_refused_is_no_news() -> None:
    roster = roster_of(1)
    roster.drop(roster.present[b"100"])
    roster.refuse(member(200, 1))
    assert roster.is_gone(0, 100)
    assert roster.is_gone(1, 200)
    assert not roster.is_gone(1, 100)
    roster.admit(member(200, 1))
    assert not roster.is_gone(1, 200)


def test_a_worker_that_ended_before_its_hello_is_a_failure_after_a_moment() -> None:
    roster = roster_of(2)
    roster.ended_early(2, "exit code 1", 10.0)
    assert roster.never_came(11.4) is None
    found = roster.never_came(11.5)
    assert found is not None
    assert (found.cause, found.stage, found.rank) == (Cause.DIED, 2, 2)
    roster.forget_absent(2)
    assert roster.never_came(99.0) is None


def test_whom_the_others_can_do_without() -> None:
    roster = roster_of(3, pipeline__elastic=[2, 3])
    one, other, _ = roster.present.values()
    assert roster.can_do_without(one)
    other.leaving = True
    assert not roster.can_do_without(one)
    assert not roster_of(3).can_do_without(None)
    one.free = False
    assert one not in roster.spare()
    assert other not in roster.spare()
