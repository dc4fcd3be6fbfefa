from __future__ import annotations

from types import SimpleNamespace

import pytest

from scpl_dist.run.phases import Phase
from scpl_dist.worker import timer as module
from scpl_dist.worker.timer import PhaseTimer


def test_seconds_belong_to_their_phase_and_to_the_block_that_was_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    timer = PhaseTimer()
    for block, phase, seconds in (
        (-1, Phase.DATA, 1),
        (0, Phase.FORWARD, 2),
        (0, Phase.SYNC, 4),
        (0, Phase.BACKWARD, 8),
        (-1, Phase.SEND, 16),
        (1, Phase.FORWARD, 32),
        (1, Phase.OPTIMIZER, 64),
        (1, Phase.EVALUATE, 128),
    ):
        timer.block = block
        timer.enter(phase)
        now += seconds
    assert timer.block_seconds() == {0: 2 + 8, 1: 32 + 64}
    stats = timer.stats()
    assert (stats.busy, stats.waiting, stats.blocked) == (1 + 2 + 8 + 16 + 32 + 64 + 128, 4, 0)
    assert stats.phases[Phase.FORWARD] == 2 + 32
