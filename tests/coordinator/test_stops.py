"""Who has asked for a stop, and how long that waits for a better reason."""

from __future__ import annotations

from scpl_dist.coordinator.stops import Stops
from scpl_dist.coordinator.watchdog import STOP_GRACE_S


def test_the_first_signal_gives_the_stop_its_name_and_a_second_one_of_its_source_is_known() -> None:
    stops = Stops()
    assert not stops.any
    assert stops.add("launcher", 2)
    assert stops.add("stage 1", 15)
    assert not stops.add("launcher", 15)
    assert (stops.any, stops.sources, stops.number, stops.name) == (True, 2, 2, "SIGINT")


def test_the_first_worker_that_asks_starts_the_wait() -> None:
    stops = Stops()
    assert not stops.due(1e9)
    stops.wait(100.0)
    stops.wait(102.0)
    assert not stops.due(99.9 + STOP_GRACE_S)
    assert stops.due(100.0 + STOP_GRACE_S)
