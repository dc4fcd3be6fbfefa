from __future__ import annotations

from scpl_dist.control.messages import Stats
from scpl_dist.coordinator.usage import Usage
from tests.support.coordinator import Run


def test_the_course_of_a_run_is_written_down_and_its_end() -> None:
    run = Run().start()
    run.pass_time(2.0, beating=run.stages)
    before = len(run.rows("usage"))
    run.beat(1, stats=Stats(busy=1.5, waiting=0.5, bytes_sent=7, peak_memory=9))
    run.pass_time(1.5, beating=(0, 2))
    found = run.rows("usage")
    assert 1 < before < len(found) <= 5
    shown = {"rank": 1, "busy": 1.5, "waiting": 0.5, "blocked": 0.0, "bytes_sent": 7, "peak_memory": 9}
    assert found[-1]["workers"][1] == shown
    run.play().leave()
    assert run.rows("usage")[-1]["workers"][1]["busy"] == run.result["per_stage"][1]["busy_seconds"]


def test_a_long_run_has_few_rows() -> None:
    usage = Usage()
    assert sum(len(list(usage.rows([], second, second))) for second in range(86_400)) < 3500
