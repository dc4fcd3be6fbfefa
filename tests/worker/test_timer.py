from __future__ import annotations

from types import SimpleNamespace

import pytest

from scpl_dist.worker import timer as module
from scpl_dist.worker.timer import PhaseTimer


def test_seconds_belong_to_their_phase_and_to_the_block_that_was_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    timer = PhaseTimer()
    for block, phase, seconds in (
        (None, "data", 1),
        (0, "forward", 2),
        (0, "sync", 4),
        (0, "backward", 8),
        (None, "send", 16),
        (1, "forward", 32),
        (1, "optimizer", 64),
        (1, "evaluate", 128),
    ):
        timer.block = block
        timer.enter(phase)
        now += seconds
    assert timer.block_seconds() == {0: 2 + 8, 1: 32 + 64}
    stats = timer.stats()
    assert (stats["busy"], stats["waiting"], stats["blocked"]) == (1 + 2 + 8 + 16 + 32 + 64 + 128, 4, 0)
    assert stats["phases"]["forward"] == 2 + 32
