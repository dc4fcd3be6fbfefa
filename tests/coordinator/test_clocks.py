from __future__ import annotations

import random

from scpl_dist.control.messages import Heartbeat
from scpl_dist.coordinator.clocks import WINDOW_S, Clocks
from scpl_dist.run.phases import Phase
from tests.support.coordinator import Run, small


def test_the_offset_is_found_to_within_the_stated_error_whatever_the_way_takes() -> None:
    draw = random.Random(3)
    offsets = {0: 0.0, 1: 123.456, 2: -9000.0}  # coordinator's clock minus the worker's
    clocks, now, found = Clocks(), 5000.0, []
    for _ in range(100):
        now += 0.5
        for rank, offset in offsets.items():
            up, down = (0.001 + draw.expovariate(20) for _ in range(2))
            lag = down - offset
            clocks.heard(rank, Heartbeat(phase=Phase.FORWARD, clock=now - up - offset, lag=lag), now)
        found += [record.row for record in clocks.rows(now)]
    assert len(found) == 5
    assert WINDOW_S == 10.0
    for row in found:
        for rank, offset in offsets.items():
            estimate, error = row["offsets"][str(rank)]
            assert abs(estimate - offset) <= error < 0.1
    best = min(row["offsets"]["1"][1] for row in found)
    assert best < 0.01


def test_a_run_that_is_traced_notes_the_clocks_and_another_does_not() -> None:
    for every, expected in ((0, 0), (100, 2)):
        run = Run(small(trace__every=every)).start()
        for _ in range(5):
            for stage in run.stages:
                run.beat(stage, clock=run.now - 50.0, lag=-50.0 + 0.002)
            run.pass_time(3.0, beating=run.stages)
        rows = run.rows("clock")
        assert len(rows) == expected
        for row in rows:
            assert {rank: [round(value, 6) for value in found] for rank, found in row["offsets"].items()} == {
                str(stage): [49.999, 0.001] for stage in run.stages
            }
