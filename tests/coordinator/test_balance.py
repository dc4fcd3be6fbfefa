"""When blocks move, and when it is not worth it."""

from __future__ import annotations

import pytest

from scpl_dist.coordinator.balance import LASTED, PATIENCE_S, STEPS, Balance


def learnt(slow: float = 1.0, steps: int = STEPS) -> Balance:
    """Six blocks in three stages; the worker of the first one becomes slower."""
    balance = Balance()
    for factor in (1.0, slow):
        for _ in range(steps):
            balance.learn({block: 0.1 * (factor if block < 2 else 1.0) for block in range(6)})
    return balance


def better(balance: Balance, now: float, left_s: float | None = None) -> list[int] | None:
    return balance.better([2, 2, 2], [1, 1, 1], now, left_s)


def test_a_slow_worker_gives_blocks_away_after_a_while() -> None:
    balance = learnt(slow=3.0)
    assert better(balance, 100.0) is None
    assert better(balance, 100.0 + PATIENCE_S - 0.1) is None
    assert better(balance, 100.0 + PATIENCE_S) == [1, 2, 3]


def test_patience_starts_again_when_the_worker_is_fast_between() -> None:
    balance = learnt(slow=3.0)
    assert better(balance, 100.0) is None
    for _ in range(STEPS):
        balance.learn(dict.fromkeys(range(6), 0.1))
    assert better(balance, 101.0) is None
    for _ in range(STEPS):
        balance.learn({block: 0.3 if block < 2 else 0.1 for block in range(6)})
    assert better(balance, 100.0 + PATIENCE_S) is None


@pytest.mark.parametrize("balance", [learnt(), learnt(slow=1.05), learnt(slow=3.0, steps=STEPS // 2 - 1)])
def test_nothing_moves_without_a_gain_or_without_knowing(balance: Balance) -> None:
    assert better(balance, 100.0) is None
    assert better(balance, 900.0) is None


def test_blocks_that_take_next_to_nothing_do_not_show_a_slow_worker() -> None:
    """Those of the first stage are frozen, and three times nothing is nothing still."""
    balance = Balance()
    for factor in (1.0, 3.0):
        for _ in range(STEPS):
            balance.learn({0: 0.0002 * factor, 1: 0.0002 * factor, 2: 0.02, 3: 0.02})
    assert balance.better([2, 2], [1, 1], 100.0) is None
    assert balance.better([2, 2], [1, 1], 100.0 + PATIENCE_S) == [3, 1]


def test_nothing_moves_at_the_end_of_a_run() -> None:
    balance = learnt(slow=3.0)
    assert better(balance, 100.0, left_s=0.5) is None
    assert better(balance, 900.0, left_s=0.5) is None
    assert better(balance, 901.0, left_s=500.0) is None
    assert better(balance, 901.0 + PATIENCE_S, left_s=500.0) == [1, 2, 3]


def after_a_move(balance: Balance, now: float, pause_s: float = 1.0) -> Balance:
    """Blocks have moved, and the worker of the first stage is slow again."""
    balance.regrouped()
    balance.moved(now, pause_s)
    for _ in range(STEPS):
        balance.learn({block: 0.3 if block < 2 else 0.1 for block in range(6)})
    return balance


def patience(balance: Balance, now: float) -> float:
    """Seconds from `now` on until blocks move."""
    waited = 0.0
    while better(balance, now + waited) is None:
        waited += 0.25
        assert waited < 1000.0
    return waited


def test_each_move_that_comes_soon_after_another_needs_more_patience_until_a_cut_has_lasted() -> None:
    balance, now = learnt(slow=3.0), 100.0
    waited = []
    for _ in range(4):
        waited.append(patience(balance, now))
        now += waited[-1]
        after_a_move(balance, now, pause_s=0.1)
    assert waited == [PATIENCE_S, 2 * PATIENCE_S, 4 * PATIENCE_S, 8 * PATIENCE_S]
    now += LASTED * 16 * PATIENCE_S
    assert patience(balance, now) == PATIENCE_S


def test_a_move_must_have_paid_before_the_next_one() -> None:
    balance = after_a_move(learnt(slow=3.0), 300.0, pause_s=50.0)
    assert better(balance, 310.0) is None
    assert better(balance, 350.0) is None
    assert better(balance, 900.0) == [1, 2, 3]


def test_losses_in_between_make_nobody_more_patient() -> None:
    balance = learnt(slow=3.0)
    for _ in range(20):
        balance.regrouped()
    assert better(balance, 100.0) is None  # nothing is known of this group yet
    for _ in range(STEPS):
        balance.learn({block: 0.3 if block < 2 else 0.1 for block in range(6)})
    assert patience(balance, 100.0) == PATIENCE_S
