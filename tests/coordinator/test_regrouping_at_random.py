"""Whatever happens to the workers, in whatever order: the run ends, and no bit of its result changes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scpl_dist.control import messages
from scpl_dist.coordinator.events import Signal
from scpl_dist.run.failures import Cause
from tests.support.coordinator import small
from tests.support.fleet import Fleet, Simulated

SHAPES: dict[str, dict[str, Any]] = {
    "as many": {},
    "elastic": {"pipeline__elastic": [1, 4]},
    "replicas": {"pipeline__stages": 2, "pipeline__replicas": [2, 1]},
    "elastic replicas": {
        "pipeline__stages": 2,
        "pipeline__replicas": [1, 2],
        "pipeline__elastic": [2, 2],
    },
}


def fleet_of(shape: str, seed: int, budget: int = 4) -> Fleet:
    values: dict[str, Any] = {"runtime__max_restarts": budget, "runtime__replace_s": 15.0}
    return Fleet(small(**values, checkpoint__every_steps=2, **SHAPES[shape]), seed)


@functools.cache
def undisturbed(shape: str) -> tuple[Any, ...]:
    fleet = fleet_of(shape, 0)
    assert fleet.finish().code == 0
    return fleet.losses(), fleet.evaluations(), fleet.numbers()


def somebody(fleet: Fleet, pick: random.Random) -> Simulated | None:
    alive = [worker for worker in fleet.workers if worker.alive and worker.heard]
    return pick.choice(alive) if alive else None


def kill(fleet: Fleet, pick: random.Random) -> None:
    worker = somebody(fleet, pick)
    if worker is not None:
        fleet.kill(worker, pick.choice([-9, -9, 1, -15]))


def kill_newest(fleet: Fleet, pick: random.Random) -> None:
    if fleet.workers[-1].alive:
        fleet.kill(fleet.workers[-1], pick.choice([-9, 1]))


def hang(fleet: Fleet, pick: random.Random) -> None:
    worker = somebody(fleet, pick)
    if worker is not None:
        worker.hung = True


def raise_(fleet: Fleet, pick: random.Random) -> None:
    worker = somebody(fleet, pick)
    if worker is not None:
        fleet.raises(worker)


def ask(fleet: Fleet, pick: random.Random) -> None:
    worker = somebody(fleet, pick)
    if worker is not None:
        fleet.asks_to_stop(worker)


def drain(fleet: Fleet, pick: random.Random) -> None:
    fleet.drain(pick.randrange(4), pick.randrange(2))


def come(fleet: Fleet, pick: random.Random) -> None:
    fleet.join(pick.choice([None, 0, 1, 2, 5]))


def come_as_another(fleet: Fleet, pick: random.Random) -> None:
    if fleet.coordinator.state != "gathering":
        fleet.join(pick.choice([None, 1]), **pick.choice([{"torch": "1.0"}, {"config": "x"}, {"code": "y"}]))


def miss(fleet: Fleet, pick: random.Random) -> None:
    worker = somebody(fleet, pick)
    if worker is not None:
        kinds = (messages.Start, messages.Join, messages.Go, messages.Work, messages.Regroup)
        worker.misses = pick.choice(kinds)


def wait(fleet: Fleet, pick: random.Random) -> None:
    fleet.wait(pick.choice([0.25, 2.0, 6.0]))


def signal(fleet: Fleet, pick: random.Random) -> None:
    if pick.random() < 0.2:
        fleet.event(Signal(pick.choice(["launcher", "coordinator"]), 15))


ACTIONS: list[Callable[[Fleet, random.Random], None]] = [
    kill,
    kill_newest,
    hang,
    raise_,
    ask,
    drain,
    come,
    come_as_another,
    miss,
    wait,
    signal,
]


@pytest.mark.parametrize("shape", SHAPES)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # what goes wrong is replayed by its seed: to shrink it takes minutes
    report_multiple_bugs=False,
)
@given(
    seed=st.integers(0, 1 << 20),
    disturbances=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(ACTIONS)), max_size=8),
    replaces=st.booleans(),
)
def test_whatever_happens_the_run_ends_and_its_result_is_that_of_an_undisturbed_one(
    shape: str,
    seed: int,
    disturbances: list[tuple[int, Callable[[Fleet, random.Random], None]]],
    replaces: bool,
) -> None:
    fleet = fleet_of(shape, seed)
    fleet.replaces = replaces
    pick = random.Random(seed)
    for turns, disturb in disturbances:
        for number in range(turns):
            if fleet.outcome is None and not fleet.turn():
                fleet.wait()
            if number % 20 == 19 and fleet.outcome is None:
                fleet.wait()
        if fleet.outcome is None:
            disturb(fleet, pick)
    outcome = fleet.finish()
    losses = fleet.losses()
    expected, evaluations, numbers = undisturbed(shape)
    if outcome.code == 0:
        assert losses == expected
        assert fleet.evaluations() == evaluations
        assert fleet.numbers() == numbers
        return
    for block in range(6):  # what is recorded is right, once and in order
        found = [row for row in losses if row[1] == block]
        assert found == [row for row in expected if row[1] == block][: len(found)]
    if outcome.failure is not None:
        assert outcome.failure.cause in Cause
        assert outcome.failure.message
