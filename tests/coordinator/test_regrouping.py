"""A worker is lost, comes, goes or gives blocks away: the others meet anew, and the result stays the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.control import messages
from scpl_dist.control.items import Evaluate
from scpl_dist.coordinator import events
from scpl_dist.coordinator.watchdog import GRACE_S, STOP_GRACE_S
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase
from tests.support.coordinator import small, without_sequence
from tests.support.fleet import Fleet, Simulated
from tests.support.replay import replay

MADE = {"runtime__max_restarts": 3, "runtime__replace_s": 20.0, "checkpoint__every_steps": 2}
ELASTIC: dict[str, Any] = {"pipeline__elastic": [2, 4]}
REPLICAS: dict[str, Any] = {"pipeline__stages": 2, "pipeline__replicas": [1, 2]}


def fleet_of(seed: int = 0, **values: Any) -> Fleet:
    return Fleet(small(**MADE | values), seed)


def undisturbed(**values: Any) -> Fleet:
    return _undisturbed(json.dumps(values))


@functools.cache
def _undisturbed(values: str) -> Fleet:
    fleet = fleet_of(**json.loads(values))
    assert fleet.finish().code == 0
    return fleet


def check_same(fleet: Fleet, **values: Any) -> None:
    """The run ends well, and with the rows and numbers of one in which nothing happens."""
    outcome = fleet.finish()
    assert (outcome.code, outcome.reason) == (0, "done"), outcome
    expected = undisturbed(**values)
    assert fleet.losses() == expected.losses()
    assert fleet.evaluations() == expected.evaluations()
    assert fleet.numbers() == expected.numbers()


def pids(fleet: Fleet) -> list[int]:
    """Of the workers of the present group, by rank."""
    members = fleet.coordinator.members
    return [members[rank].hello.pid for rank in sorted(members)]


# A worker is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("step", [0, 3, 8])
@pytest.mark.parametrize("code", [-9, 1, -15])
def test_a_lost_worker_is_replaced_and_the_others_stay(stage: int, step: int, code: int) -> None:
    fleet = fleet_of(seed=step + stage).until_step(step)
    before = pids(fleet)
    fleet.kill(fleet.at(stage), code)
    check_same(fleet)
    assert [new == old for new, old in zip(pids(fleet), before, strict=True)] == [
        k != stage for k in range(3)
    ]
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("died",)
    assert dict(fleet.coordinator.regroups) == {"loss": 1}
    (row,) = fleet.events_of("restart")
    assert (row["number"], row["cause"], row["stage"]) == (1, "died", stage)


@pytest.mark.parametrize("state", ["gathering", "loading", "preparing", "joining", "regrouping"])
@pytest.mark.parametrize("again", [False, True])
def test_a_worker_may_die_in_any_state(state: str, again: bool) -> None:
    fleet = fleet_of()
    if again:
        fleet.until_step(4).kill(fleet.at(1))
        if state in ("gathering", "loading"):
            return  # only before the first group
    elif state == "regrouping":
        return  # not before the first group
    described = fleet.workers[0].outbox.pop() if state == "loading" else None  # it still reads its data
    fleet.until(lambda found: found.coordinator.state == state and len(found.coordinator.present) > 1)
    fleet.kill(fleet.workers[2])
    if described is not None:
        fleet.until_state("gathering")
        fleet.workers[0].outbox.append(described)
    check_same(fleet)
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("died",) * (1 + again)


def test_items_after_the_cut_are_those_of_an_undisturbed_run() -> None:
    fleet = fleet_of().until_step(5)
    fleet.kill(fleet.at(2))
    fleet.finish()
    old = without_sequence(undisturbed().items[0].values())
    new = without_sequence(fleet.items[1].values())
    assert new == old[-len(new) :]
    assert len(new) < len(old)


def test_two_die_at_once() -> None:
    fleet = fleet_of().until_step(4)
    first, second = fleet.at(0), fleet.at(2)
    fleet.kill(first)
    fleet.kill(second)
    check_same(fleet)
    assert dict(fleet.coordinator.regroups) == {"loss": 1}


def test_all_die_at_once() -> None:
    fleet = fleet_of().until_step(4)
    for worker in fleet.workers[:3]:
        fleet.kill(worker)
    check_same(fleet)


@pytest.mark.parametrize("heard", [False, True])
def test_a_replacement_that_dies_is_replaced(heard: bool) -> None:
    fleet = fleet_of().until_step(4)
    fleet.kill(fleet.at(1))
    fleet.until(lambda found: len(found.workers) == 4)
    if heard:
        fleet.until(lambda found: found.workers[3].peer in found.coordinator.present)
    fleet.kill(fleet.workers[3], 1)
    check_same(fleet)
    assert len(fleet.workers) == 5


def test_the_same_failure_again_and_again_is_a_storm() -> None:
    fleet = fleet_of(runtime__max_restarts=50).until_step(4)
    fleet.until(lambda found: found.recorded(5))
    number = 0
    while fleet.outcome is None:
        number += 1
        fleet.until(lambda found: found.coordinator.state == "running")
        if fleet.outcome is None:
            fleet.raises(fleet.at(1))
            fleet.until(lambda found: found.coordinator.state != "running")
    assert number == 2
    assert fleet.finish().failure is not None
    assert "the same failure came 2 times in a row" in fleet.outcome.final


def test_the_budget_ends_a_run_without_elastic() -> None:
    fleet = fleet_of(runtime__max_restarts=1).until_step(4)
    fleet.kill(fleet.at(1))
    fleet.until_step(7).kill(fleet.at(2))
    outcome = fleet.finish()
    assert (outcome.code, outcome.survived) == (1, ("died",))
    assert "runtime.max_restarts = 1 restarts are used up" in outcome.final


def test_the_budget_ends_replacements_of_a_run_with_elastic_and_the_others_go_on() -> None:
    values = {"runtime__max_restarts": 1, "run__epochs": 6, **ELASTIC}
    fleet = fleet_of(**values).until_step(4)
    fleet.kill(fleet.at(1))
    fleet.until_step(7).kill(fleet.at(2))
    check_same(fleet, **values)
    assert len(fleet.workers) == 4  # one was replaced
    assert fleet.coordinator.layout.stages == 2


def test_an_elastic_run_shrinks_to_its_least_and_then_fails() -> None:
    fleet = fleet_of(runtime__max_restarts=0, **ELASTIC).until_step(4)
    fleet.kill(fleet.at(0))
    fleet.until(lambda found: found.coordinator.layout.stages == 2).until_step(5)
    assert fleet.outcome is None
    fleet.kill(fleet.at(1))
    outcome = fleet.finish()
    assert outcome.code == 1
    assert outcome.failure is not None
    assert outcome.failure.cause is Cause.DIED


def test_if_nobody_comes_in_its_place_the_first_loss_ends_the_run() -> None:
    fleet = fleet_of().until_step(4)
    fleet.replaces = False
    fleet.kill(fleet.at(1))
    fleet.until_state("regrouping").raises(fleet.workers[0])
    outcome = fleet.finish()
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.stage) == (Cause.DIED, 1)
    assert any("within 20 s (runtime.replace_s)" in text for text in fleet.said)


def test_a_hung_worker_is_replaced() -> None:
    fleet = fleet_of().until_step(4)
    hung = fleet.at(1)
    hung.hung = True
    check_same(fleet)
    assert not hung.alive


def test_all_meet_anew_after_a_deadlock() -> None:
    fleet = fleet_of().until_step(4)
    for worker in fleet.workers:
        worker.running = False
        worker.outbox.clear()
    check_same(fleet)
    assert len(fleet.workers) == 3
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("deadlock",)


def test_whoever_seems_dead_while_the_others_meet_is_looked_at_first() -> None:
    fleet = fleet_of(**ELASTIC).until_step(4)
    fleet.join()
    fleet.until_state("regrouping")
    victim = fleet.workers[1]
    fleet.until(lambda found: not any(one.inbox or one.outbox for one in found.workers if one is not victim))
    fleet.event(
        events.Exited(1, 3, victim.pid)
    )  # it has exited by itself, and its last words may be under way
    victim.alive = False
    check_same(fleet, **ELASTIC)
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("died",)


@pytest.mark.parametrize(
    "kind", [messages.Start, messages.Join, messages.Go, messages.Work, messages.Regroup]
)
def test_whoever_missed_a_message_when_its_connection_broke_is_replaced_soon(
    kind: type[messages.Message],
) -> None:
    fleet = fleet_of()
    before: tuple[str, ...] = ()
    if kind is messages.Regroup:
        fleet.until_step(4).kill(fleet.at(1))
        before = ("died",)
    elif kind is messages.Work:
        fleet.until_step(4)
    victim = fleet.workers[0]
    victim.misses = kind
    fleet.until(lambda found: victim.misses is None)
    missed = fleet.now
    fleet.until(lambda found: not victim.alive)  # though it says that it lives
    assert fleet.now - missed < GRACE_S + 2
    check_same(fleet)
    assert fleet.outcome is not None
    assert fleet.outcome.survived == (*before, "unreachable")


def test_items_that_are_lost_on_the_way_unnoticed_are_a_loss_that_a_run_survives() -> None:
    fleet = fleet_of().until_step(4)
    fleet.at(0).done += 1  # it handles what comes as if nothing were missing
    check_same(fleet)
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("protocol",)


# Hellos -------------------------------------------------------------------------------------------------------------


def test_a_replacement_may_say_hello_before_the_death_is_noticed() -> None:
    fleet = fleet_of().until_step(4)
    fleet.replaces = False
    lost = fleet.at(1)
    lost.hung = True
    fleet.join(rank=1)
    check_same(fleet)
    assert fleet.at(1).pid != lost.pid


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"torch": "1.0"}, "torch version of this worker is 1.0, the run has 2.14.1"),
        ({"config": "abc"}, "configuration digest of this worker is abc, the run has "),
        ({"code": "abc"}, "digest of the user's files of this worker is abc, the run has "),
    ],
)
@pytest.mark.parametrize("all_lost", [False, True])
def test_a_worker_of_another_kind_is_refused_and_the_run_is_unharmed(
    changes: dict[str, str], text: str, all_lost: bool
) -> None:
    fleet = fleet_of().until_step(4)
    for worker in fleet.workers[: 3 if all_lost else 1]:
        fleet.kill(worker)
    fleet.until_state("regrouping")
    other = fleet.join(rank=0, **changes)
    fleet.until(lambda found: bool(other.heard))
    (refusal,) = other.heard
    assert isinstance(refusal, messages.Refuse)
    assert text in refusal.reason
    check_same(fleet)


def test_a_spare_worker_that_dies_or_is_told_to_stop_harms_nobody() -> None:
    ends: list[Callable[[Fleet, Simulated], None]] = [
        lambda fleet, spare: fleet.event(events.Unreachable(spare.peer, messages.Alive())),
        lambda fleet, spare: fleet.raises(spare),
        lambda fleet, spare: fleet.asks_to_stop(spare),
    ]
    for end in ends:
        fleet = fleet_of(run__epochs=6).until_step(4)
        spare = fleet.join()
        fleet.until(lambda found: len(found.coordinator.present) == 4)
        end(fleet, spare)
        check_same(fleet, run__epochs=6)
        assert not fleet.coordinator.regroups
        assert not fleet.events_of("restart")


def test_workers_of_two_hosts_may_have_the_same_process_id() -> None:
    fleet = fleet_of()
    fleet.workers[1] = fleet.join(1, pid=fleet.workers[2].pid, host="there")
    fleet.workers.pop()
    fleet.until_step(4)
    victim = fleet.at(2)
    fleet.kill(victim)
    check_same(fleet)
    assert [member.hello.host for member in fleet.coordinator.ordered()] == ["here", "there", "here"]


# Who is waited for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["joined", "stopped", "other, joined", "drained, other"])
def test_nobody_waits_for_a_worker_in_whose_place_none_is_started(who: str) -> None:
    values = {**ELASTIC, "run__epochs": 6}
    fleet = fleet_of(**values).until_step(1)
    joined = fleet.join()
    fleet.until(lambda found: found.coordinator.layout.stages == 4).until_state("running")
    began = fleet.now
    if who == "drained, other":
        fleet.drain(1)
    if "other" in who:
        fleet.kill(fleet.at(0))
    if "joined" in who:
        fleet.kill(joined)
    joined.hung = who == "stopped"
    fleet.until_state("regrouping", group=2).until_state("running", group=2)
    noticed = fleet.config.runtime.timeout_s if who == "stopped" else GRACE_S
    assert fleet.now - began < noticed + 2
    assert fleet.coordinator.layout.stages == 3
    check_same(fleet, **values)


def test_nobody_waits_for_a_replacement_that_dies_when_no_other_is_started() -> None:
    values = {**ELASTIC, "runtime__max_restarts": 1}
    fleet = fleet_of(**values).until_step(1)
    fleet.kill(fleet.at(1))
    fleet.until(lambda found: len(found.workers) == 4)
    began = fleet.now
    fleet.kill(fleet.workers[3])
    fleet.until_state("running", group=1)
    assert fleet.now - began < GRACE_S + 2
    assert fleet.coordinator.layout.stages == 2
    check_same(fleet, **values)


# Workers that come and go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["checkpoint", "evaluation", "step", "end"])
def test_a_run_grows_when_somebody_comes(when: str) -> None:
    fleet = fleet_of(**ELASTIC)
    reached: dict[str, Callable[[Fleet], bool]] = {
        "checkpoint": lambda found: bool(found.commits),
        "evaluation": lambda found: any(
            isinstance(item, Evaluate) and item.sequence == found.at(0).done
            for item in found.items.get(0, {}).values()
            if found.coordinator.state == "running"
        ),
        "step": lambda found: found.recorded(4),
        "end": lambda found: any(member.left for member in found.coordinator.members.values()),
    }
    fleet.until(reached[when])
    newcomer = fleet.join()
    check_same(fleet, **ELASTIC)
    assert (newcomer.place is None) == (when == "end")
    assert fleet.coordinator.layout.stages == (3 if when == "end" else 4)


@pytest.mark.parametrize("step", range(6))
def test_a_newcomer_makes_nobody_train_a_step_twice(step: int) -> None:
    # The checkpoint after an epoch that was not the best one does not stay, and so it is no cut to go on from.
    values = ELASTIC | {"checkpoint__every_steps": 0, "checkpoint__best": True}
    fleet = fleet_of(**values).until_step(step)
    fleet.join()
    check_same(fleet, **values)
    assert dict(fleet.coordinator.regroups) == {"join": 1}
    assert fleet.repeated == 0


def test_a_run_grows_to_its_most_and_refuses_more() -> None:
    values = {"run__epochs": 6, **ELASTIC}
    fleet = fleet_of(**values).until_step(4)
    fleet.join()
    fleet.until(lambda found: found.coordinator.layout.stages == 4).until_state("running")
    fleet.coordinator.restarts.limit = 0
    refused = fleet.join()
    fleet.until(lambda found: bool(refused.heard))
    assert refused.heard == [messages.Refuse(reason="all 4 places are taken")]
    check_same(fleet, **values)


def test_a_drained_worker_leaves_after_a_cut_and_nothing_is_trained_twice() -> None:
    fleet = fleet_of(**ELASTIC).until_step(4)
    drained = fleet.at(1)
    assert fleet.drain(1) == messages.Alive()
    assert fleet.drain(1) == messages.Alive()  # twice is once
    trained = sum(len(row) > 0 for row in fleet.events_of("train"))
    check_same(fleet, **ELASTIC)
    assert trained
    assert isinstance(drained.heard[-1], messages.Close)
    assert dict(fleet.coordinator.regroups) == {"drain": 1}
    rewinds = [json.loads(text) for text in fleet.commanded if '"is": "Rewind"' in text]
    cuts = [row["step"] for row in fleet.events_of("checkpoint")]
    assert rewinds[0]["step"] in cuts


def test_a_drain_soon_after_the_start_waits_for_nobody() -> None:
    fleet = fleet_of(**ELASTIC).until_step(1)
    began = fleet.now
    fleet.drain(1)
    fleet.until_state("running", group=1)
    assert fleet.now - began < 5


def test_drains_that_are_refused() -> None:
    fleet = fleet_of().until_step(1)
    answer = fleet.drain(1)
    assert isinstance(answer, messages.Refuse)
    assert "set pipeline.elastic = [fewest, most]" in answer.reason
    fleet = fleet_of(**ELASTIC).until_step(1)
    assert fleet.drain(5) == messages.Refuse(reason="there is no stage 5 now, the run has 3 stages")
    assert fleet.drain(1, 1) == messages.Refuse(reason="there is no stage 1.1 now, the run has 3 stages")
    assert fleet.drain(2) == messages.Alive()
    assert isinstance(fleet.drain(0), messages.Refuse)  # two must stay


def test_a_drained_worker_that_dies_first_is_not_replaced() -> None:
    fleet = fleet_of(**ELASTIC).until_step(4)
    fleet.drain(1)
    fleet.kill(fleet.at(1))
    check_same(fleet, **ELASTIC)
    assert len(fleet.workers) == 3
    assert fleet.coordinator.restarts.left == 3


def test_replicas_come_and_go() -> None:
    values: dict[str, Any] = {**REPLICAS, "pipeline__elastic": [2, 2], "runtime__max_restarts": 0}
    fleet = fleet_of(**values).until_step(2)
    fleet.kill(fleet.at(1, 1))
    fleet.until(lambda found: found.coordinator.layout.world == 2).until_state("running")
    fleet.join()
    fleet.until(lambda found: found.coordinator.layout.world == 3)
    check_same(fleet, **values)


def test_a_cut_holds_only_the_samples_before_it_if_a_replica_of_the_last_stage_is_ahead() -> None:
    for seed in range(6):
        fleet = fleet_of(seed, **REPLICAS).until_step(4)
        fleet.kill(fleet.at(0))
        check_same(fleet, **REPLICAS)


def test_a_group_that_dies_before_it_has_built_does_not_spoil_the_cut_of_the_blocks() -> None:
    fleet = fleet_of(**ELASTIC).until_step(2)
    fleet.drain(0)
    fleet.until_state("preparing")
    fleet.kill(fleet.at(1))
    check_same(fleet, **ELASTIC)


def moving(epochs: int) -> Fleet:
    """Its first stage is held back."""
    fleet = fleet_of(pipeline__balance="auto", run__epochs=epochs, checkpoint__every_steps=0).until_step(1)
    for worker in fleet.workers:
        worker.pace = lambda block: 0.1
    fleet.at(0).pace = lambda block: 0.3
    return fleet


def play_until_it_moves(fleet: Fleet) -> None:
    for step in range(2, 60, 4):
        fleet.until_step(step).wait(0.5)
        if fleet.coordinator.group:
            return


@pytest.mark.parametrize("dies", [False, True])
def test_blocks_move_to_where_they_are_faster(dies: bool) -> None:
    fleet = moving(epochs=30)
    play_until_it_moves(fleet)
    (move,) = fleet.events_of("move")
    assert (move["from"], move["to"]) == ([2, 2, 2], [1, 2, 3])
    if dies:
        fleet.until_state("preparing")
        fleet.kill(fleet.at(2))
    values = {"pipeline__balance": "auto", "run__epochs": 30, "checkpoint__every_steps": 0}
    check_same(fleet, **values)
    assert fleet.coordinator.regroups["move"] == 1
    if not dies:
        assert [len(fleet.at(stage).blocks) for stage in range(3)] == [1, 2, 3]


def test_a_drain_that_is_asked_for_while_blocks_move_is_done_with_it() -> None:
    fleet = fleet_of(**ELASTIC, run__epochs=6).until_step(4)
    fleet.join()
    fleet.until(lambda found: found.coordinator.flow is not None and found.coordinator.flow.sequence.held)
    fleet.drain(1)
    check_same(fleet, **ELASTIC, run__epochs=6)
    assert fleet.coordinator.layout.stages == 3


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["gathering", "preparing", "joining", "running", "regrouping"])
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_stops_the_run_in_every_state(state: str, again: bool) -> None:
    fleet = fleet_of()
    if again and state != "gathering":
        fleet.until_step(4).kill(fleet.at(1))
    elif state == "regrouping":
        return
    fleet.until_state(state, group=int(again and state != "gathering"))
    fleet.event(events.Signal("launcher", 15))
    outcome = fleet.finish()
    assert outcome.code == 143
    if again and state in ("preparing", "joining", "regrouping"):
        step = (fleet.coordinator.origin.resume or {})["step"]
        assert outcome.reason == f"stopped by SIGTERM between two groups; the run goes on from step {step}"


def test_a_second_signal_stops_at_once_and_a_death_after_the_first_is_final() -> None:
    fleet = fleet_of().until_step(4)
    fleet.event(events.Signal("launcher", 15))
    fleet.event(events.Signal("launcher", 15))
    assert fleet.finish().reason == "stopped at once by a second SIGTERM"
    fleet = fleet_of().until_step(4)
    fleet.event(events.Signal("launcher", 15))
    fleet.kill(fleet.at(1))
    outcome = fleet.finish()
    assert (outcome.code, outcome.survived) == (1, ())


def test_whoever_started_the_workers_may_end_the_others_when_one_has_died() -> None:
    fleet = fleet_of().until_step(4)
    fleet.kill(fleet.at(1))
    fleet.until_state("regrouping")
    for worker in fleet.workers:
        if worker.alive and worker.heard:
            fleet.asks_to_stop(worker)
    fleet.until(lambda found: not any(worker.alive for worker in found.workers[:3]))
    for rank in (0, 2):
        fleet.join(rank)  # they come again
    check_same(fleet)


@pytest.mark.parametrize("order", ["asked, dead", "dead, asked", "dead, suspected, asked"])
@pytest.mark.parametrize("seed", range(3))
def test_that_they_are_told_to_stop_may_be_known_before_the_death(order: str, seed: int) -> None:
    fleet = fleet_of(seed).until_step(4)
    fleet.replaces = False
    old = list(fleet.workers)
    for worker in old:
        worker.launched = False  # nobody sees how it ends
    for what in order.split(", "):
        if what == "dead":
            fleet.kill(old[1])
        elif what == "suspected":
            fleet.until(lambda found: found.coordinator._suspects.any)
        else:
            for worker in (old[0], old[2]):
                fleet.hear(worker, messages.StopRequested(signal=15))
    fleet.until(lambda found: not any(worker.alive for worker in old))
    for rank in (2, 0, 1):
        fleet.join(rank)
    check_same(fleet)
    assert fleet.outcome is not None
    assert fleet.outcome.survived == ("unreachable",)
    (row,) = fleet.events_of("restart")
    assert (row["number"], row["stage"]) == (1, 1)


def test_a_death_long_after_the_others_were_told_to_stop_does_not_explain_it() -> None:
    fleet = fleet_of().until_step(4)
    for worker in fleet.workers:
        worker.launched = False
    fleet.workers[1].hung = True
    for worker in (fleet.workers[0], fleet.workers[2]):
        fleet.hear(worker, messages.StopRequested(signal=15))
    fleet.wait(STOP_GRACE_S + 1)
    fleet.kill(fleet.workers[1])
    outcome = fleet.finish()
    assert (outcome.code, outcome.survived) == (1, ())


def test_the_death_of_a_worker_that_was_told_to_stop_with_the_others_is_final() -> None:
    fleet = fleet_of().until_step(4)
    for worker in fleet.workers:
        fleet.hear(worker, messages.StopRequested(signal=15))
    fleet.kill(fleet.workers[1])
    outcome = fleet.finish()
    assert (outcome.code, outcome.survived) == (1, ())


def test_the_loss_of_the_launcher_while_the_others_meet_ends_the_run() -> None:
    fleet = fleet_of().until_step(4)
    fleet.kill(fleet.at(1))
    fleet.until_state("regrouping")
    fleet.event(events.LauncherLost())
    outcome = fleet.finish()
    assert outcome.failure is not None
    assert outcome.failure.cause is Cause.DIED  # which was first


@pytest.mark.parametrize("drained", [False, True])
def test_a_signal_to_the_worker_that_leads_stops_the_run_and_a_drain_lets_the_others_go_on(
    drained: bool,
) -> None:
    fleet = Fleet(small(**MADE | ELASTIC), led=True).until_step(2)
    leader = fleet.at(0)
    if drained:
        assert fleet.drain(0) == messages.Alive()
        fleet.until_state("running", group=1)
        assert isinstance(leader.heard[-1], messages.Close)
        fleet.event(events.Signal("launcher", 15))
    else:
        fleet.hear(leader, messages.StopRequested(signal=15))
    assert fleet.finish().code == 143
    assert dict(fleet.coordinator.regroups) == ({"drain": 1} if drained else {})


@pytest.mark.parametrize("order", ["dead, lost, asked", "dead, suspected, asked", "asked, dead"])
@pytest.mark.parametrize("drained", [False, True])
def test_the_worker_that_leads_is_told_to_end_as_another_one_of_its_host_has_died(
    order: str, drained: bool
) -> None:
    fleet = Fleet(small(**MADE | ELASTIC), led=True).until_step(2)
    leader, dies = fleet.at(0), fleet.at(1)
    dies.launched = False  # nobody sees how it ends
    if drained:
        fleet.drain(0)
        fleet.until_state("running", group=1)
    for what in order.split(", "):
        if what == "dead":
            fleet.kill(dies)
        elif what == "lost":
            fleet.until(lambda found: found.coordinator._lost is not None)
        elif what == "suspected":
            fleet.until(lambda found: found.coordinator._suspects.any)
        elif drained:
            fleet.event(events.Signal("launcher", 15))
        else:
            fleet.hear(leader, messages.StopRequested(signal=15))
    if order == "dead, lost, asked":
        assert fleet.outcome is not None  # at once: torchrun waits for it
    outcome = fleet.finish()
    assert (outcome.code, outcome.reason, outcome.final) == (1, "unreachable", "")  # so all start again


def test_the_loss_of_the_launcher_is_survived_by_no_deadlock_before_it() -> None:
    fleet = fleet_of(**ELASTIC).until_step(4)
    for worker in fleet.workers:
        worker.running = False  # they only wait
    while fleet.coordinator.state == "running":
        fleet.wait()
    assert fleet.coordinator._lost is not None
    assert fleet.coordinator._lost.cause is Cause.DEADLOCK
    fleet.event(events.LauncherLost())
    assert fleet.outcome is not None
    assert (fleet.outcome.code, fleet.outcome.reason) == (1, "deadlock")


# Late news ----------------------------------------------------------------------------------------------------------


def test_late_messages_of_an_old_group_change_nothing() -> None:
    fleet = fleet_of().until_step(4)
    fleet.kill(fleet.at(1))
    late: list[messages.Message] = [
        messages.Done(sequence=3),
        messages.Written(sequence=3, files=[], seconds=0.0),
        messages.Ready(),
        messages.Built(blocks=[0]),
        messages.Left(),
        messages.Failed(cause=Cause.PEER_LOST, message="reset", peer=2),
        messages.Heartbeat(phase=Phase.FORWARD, stats=messages.Stats(begun=50)),
    ]
    for state in ("regrouping", "preparing", "joining", "running"):
        fleet.until_state(state, group=1)
        for message in late:
            fleet.hear(fleet.workers[0], message)
        assert fleet.coordinator.state == state
    check_same(fleet)


def test_a_checkpoint_that_is_being_published_is_waited_for_and_is_the_cut() -> None:
    fleet = fleet_of()
    fleet.until(lambda found: bool(found.commits) and found.commits[0].step == 4)
    fleet.kill(fleet.at(1))
    fleet.until(lambda found: found.coordinator.state == "regrouping" or not found.commits)
    rewound = fleet.coordinator.origin.resume
    check_same(fleet)
    assert rewound is None or rewound["step"] <= 4
    assert any('"is": "Rewind"' in text and '"step": 4' in text for text in fleet.commanded)


def test_a_checkpoint_that_is_never_published_ends_the_wait() -> None:
    fleet = fleet_of()
    fleet.until(lambda found: bool(found.commits))
    fleet.commits.clear()  # the disk does not answer any more
    fleet.kill(fleet.at(1))
    outcome = fleet.finish()
    assert outcome.failure is not None
    assert "publishing the checkpoint" in outcome.failure.message


def test_a_run_with_regroups_can_be_replayed(tmp_path: Path) -> None:
    fleet = fleet_of(**ELASTIC).until_step(3)
    fleet.kill(fleet.at(1))
    fleet.until_step(5)
    fleet.drain(0)
    fleet.finish()
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{line}\n" for line in fleet.coordinator.log.lines()))
    again = replay(path)
    assert again.outcome == fleet.outcome
    assert again.regroups == fleet.coordinator.regroups
