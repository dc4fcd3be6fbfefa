"""The snapshot of a run: its fixed fields, and what they say at each moment of a run."""

from __future__ import annotations

import json

import pytest

from scpl_dist.control.messages import Stats
from scpl_dist.coordinator.events import Committed
from scpl_dist.coordinator.status import shares, snapshot
from scpl_dist.run.phases import Phase
from tests.coordinator.test_machine_replicas import Run as ReplicatedRun
from tests.support.coordinator import Run, at_step

FIXED = {"state", "generation", "step", "epoch", "accuracies", "workers"}
OF_A_WORKER = {"stage", "replica", "rank", "host", "pid", "phase", "step", "busy", "waiting", "blocked"}


def test_fields_are_there_before_during_and_after_a_run() -> None:
    run = Run()
    moments = [snapshot(run.coordinator, run.now)]
    run.hello(1)
    moments.append(snapshot(run.coordinator, run.now))
    run.start().play()
    moments.append(snapshot(run.coordinator, run.now))
    run.leave()
    moments.append(snapshot(run.coordinator, run.now))
    assert [moment["state"] for moment in moments] == ["gathering", "gathering", "running", "over"]
    for moment in moments:
        assert moment.keys() == moments[0].keys() >= FIXED
        assert [worker["stage"] for worker in moment["workers"]] == [0, 1, 2]
        for worker in moment["workers"]:
            assert worker.keys() == moments[0]["workers"][0].keys() >= OF_A_WORKER
        assert json.loads(json.dumps(moment, allow_nan=False)) == moment


def test_values_are_those_of_the_run() -> None:
    run = Run().start().play(until=at_step(4))
    run.event(Committed(5, 1234, 0.5))
    run.now += 7
    run.beat(
        1, Phase.FORWARD, step=5, epoch=1, stats=Stats(busy=3.0, waiting=2.0, blocked=1.0, peak_memory=30)
    )
    status = snapshot(run.coordinator, run.now, {"died": 2})
    expected = {"method": "scpl", "step": 5, "steps": 9, "epochs": 3, "samples": 90, "checkpoints": 1}
    assert {key: status[key] for key in expected} == expected
    assert status["accuracies"] == [{"epoch": 0, "validation": 0.5, "test": 0.5}]
    assert status["last_checkpoint"]["bytes"] == 1234
    assert status["last_checkpoint"]["age"] == 7
    assert status["restarts"] == {"died": 2}
    worker = status["workers"][1]
    place = {"stage": 1, "replica": 0, "rank": 1, "host": "host1", "phase": "forward", "step": 5, "epoch": 1}
    times = {"busy": 3.0, "waiting": 2.0, "blocked": 1.0, "peak_memory": 30, "losses": {"1": 2.0}}
    assert {key: worker[key] for key in place | times} == place | times


def test_a_block_that_is_frozen_on_the_way_has_no_loss_any_more() -> None:
    run = Run().start()
    for step, losses in enumerate(({"1": {"local": 2.0}, "2": {"local": 3.0}}, {"2": {"local": 1.0}}, {})):
        run.done(1, losses=losses)
        found = snapshot(run.coordinator, run.now)["workers"][1]["losses"]
        assert found == {block: terms["local"] for block, terms in losses.items()}, step


def test_replicas_stand_beside_each_other() -> None:
    run = ReplicatedRun().start()
    workers = snapshot(run.coordinator, run.now)["workers"]
    places = [(worker["stage"], worker["replica"]) for worker in workers]
    assert places == sorted(places)
    assert max(places)[1] > 0
    assert [worker["name"] for worker in workers] == [
        run.coordinator.layout.workers[w["rank"]].label for w in workers
    ]


def test_a_worker_that_has_not_come_has_counted_nothing() -> None:
    run = Run()
    run.hello(0)
    here, away, _ = snapshot(run.coordinator, run.now)["workers"]
    assert (here["up"], here["host"], here["phase"]) == (True, "host0", "starting")
    assert (away["up"], away["host"], away["phase"], away["busy"]) == (False, None, None, 0.0)


def test_shares_sum_to_one() -> None:
    assert shares(1.0, 2.0, 1.0) == pytest.approx((0.25, 0.5, 0.25))
    assert shares(0.0, 0.0, 0.0) is None
