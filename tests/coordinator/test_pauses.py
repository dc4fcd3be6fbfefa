"""Time in which the coordinator was stopped is nobody's fault."""

from __future__ import annotations

from scpl_dist.coordinator.pauses import Pauses


def test_time_stands_still_while_nobody_listens() -> None:
    pauses = Pauses()
    assert not pauses.notice(1000.0)  # the first event
    assert not pauses.notice(1005.0)
    assert pauses.clock(1005.0) == 1005.0
    assert pauses.notice(1035.0)
    assert pauses.latest == 30.0
    assert pauses.clock(1036.0) == 1006.0


def test_a_long_pause_explains_deaths_soon_after_it() -> None:
    pauses = Pauses()
    pauses.notice(1000.0)
    assert not pauses.explains(1000.0, 10.0)
    pauses.notice(1030.0)
    assert pauses.explains(pauses.clock(1033.0), 10.0)
    assert not pauses.explains(pauses.clock(1033.1), 10.0)
    assert not pauses.explains(pauses.clock(1030.0), 31.0)
