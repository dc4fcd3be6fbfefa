"""When a failed run is started again, and when its cause is shown instead."""

from __future__ import annotations

import pytest

from scpl_dist.coordinator.restarts import End, Restarts
from scpl_dist.run.failures import MEANING


def died(stage: int = 0, step: int = 5, cause: str = "died") -> End:
    return End(1, cause, "the reason", stage, step)


def test_restarts_are_counted_by_cause_until_the_limit() -> None:
    restarts = Restarts(2)
    assert restarts.refusal(died(step=1)) is None
    assert restarts.refusal(died(step=2, cause="hang")) is None
    assert restarts.causes == ["died", "hang"]
    assert restarts.left == 0
    refusal = restarts.refusal(died(step=3))
    assert refusal is not None
    assert "runtime.max_restarts = 2 restarts are used up" in refusal


def test_the_same_failure_without_progress_is_a_storm() -> None:
    restarts = Restarts(100)
    assert restarts.refusal(died()) is None
    assert restarts.refusal(died()) is None
    refusal = restarts.refusal(died(step=4))
    assert refusal is not None
    assert "3 times in a row, each before step 6 was done" in refusal


@pytest.mark.parametrize(
    "second",
    [died(stage=1), died(step=6), died(cause="hang")],
    ids=["other stage", "progress", "other cause"],
)
def test_progress_or_another_failure_is_no_storm(second: End) -> None:
    restarts = Restarts(100)
    assert restarts.refusal(died()) is None
    assert restarts.refusal(died()) is None
    assert restarts.refusal(second) is None
    assert restarts.refusal(second) is None


@pytest.mark.parametrize("cause", [cause for cause, meaning in MEANING.items() if meaning.final])
def test_what_a_restart_cannot_help_against_is_final(cause: str) -> None:
    assert Restarts(5).refusal(died(cause=cause)) is not None


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_only_failures_are_followed_by_a_restart(code: int) -> None:
    assert Restarts(5).refusal(End(code, "", "done")) is not None
