"""The coordinator as a state machine: events in, commands out, and time is a number."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from scpl_dist.control.items import Checkpoint, EpochEnd, Evaluate, Item, Train
from scpl_dist.control.messages import (
    PROTOCOL,
    VERSION,
    Abort,
    Alive,
    Done,
    Failed,
    Left,
    Ready,
    Refuse,
    Regroup,
    Start,
    Stats,
    StopRequested,
    Work,
    Written,
)
from scpl_dist.coordinator.events import (
    Commit,
    Committed,
    Garbage,
    LauncherLost,
    NotWritten,
    Received,
    Send,
    Signal,
    Tick,
    Unreachable,
)
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase
from tests.support import invariants
from tests.support.coordinator import Run, at_step, kinds, small, without_sequence


def test_a_run_is_scheduled_as_drawn() -> None:
    run = Run().start().play()
    assert kinds(run.items()) == "tttevvx" * 3 + "cs"
    assert [item.sequence for item in run.items()] == list(range(23))
    train = run.items_of(Train)
    assert [item.micro_batches for item in train[:3]] == [((0, 20),), ((20, 40),), ((40, 50),)]
    assert [item.step for item in train] == list(range(9))
    assert [(item.micro_batches, item.last) for item in run.items_of(Evaluate)[:3]] == [
        (((0, 20),), False),
        (((20, 30),), True),
        (((0, 20),), True),
    ]


@pytest.mark.parametrize(
    ("every", "picture"),
    [
        (1, "tctctevvxc" + "tctctevvxc" + "tctctevvxcs"),
        (2, "ttctevvx" + "tcttevvxc" + "ttctevvxcs"),
        (9, "tttevvx" + "tttevvx" + "tttevvxcs"),
    ],
)
def test_checkpoints_follow_their_steps_and_never_come_twice(every: int, picture: str) -> None:
    run = Run(small(checkpoint__every_steps=every)).start().play()
    assert kinds(run.items()) == picture
    steps = [item.step for item in run.items_of(Checkpoint)]
    assert steps == sorted(set(steps))


def test_the_best_weights_stay_also_where_checkpoints_are_written_at_the_end_only() -> None:
    run = Run(small(checkpoint__best=True)).start()
    while (item := run.next_item) is not None:
        for stage in run.stages:
            if isinstance(item, Evaluate) and (stage, item.epoch) == (2, 1):
                begin, end = item.micro_batches[0]
                run.done(stage, metrics={"accuracy": (end - begin, end - begin)})
            else:
                run.done(stage)
    assert kinds(run.items()) == "tttevvxc" + "tttevvxc" + "tttevvxcs"
    assert [(commit.step, commit.best) for commit in run.only(Commit)] == [(3, True), (6, True), (9, False)]


def test_the_learning_rate_is_a_staircase_from_lr_towards_end_lr() -> None:
    run = Run(small(optimizer__lr=1.0, optimizer__end_lr=0.0)).start().play()
    rates = [item.schedule["lr"] for item in run.items_of(Train)]
    assert rates[0] == 1.0
    assert rates[:3] == [rates[0]] * 3
    assert rates[3:6] == pytest.approx([0.75] * 3)
    assert rates[6:] == pytest.approx([0.25] * 3)


def test_batches_share_an_update_and_an_epoch_ends_with_one() -> None:
    run = Run(small(optimizer__accumulate=2)).start().play()
    found = [(item.share, item.update) for item in run.items_of(Train)]
    assert found == [(0.5, False), (0.5, True), (1.0, True)] * 3


def test_gpipe_splits_a_batch_into_near_equal_micro_batches() -> None:
    run = Run(small(run__method="gpipe", pipeline__micro_batches=3)).start()
    assert run.items_of(Train)[0].micro_batches == ((0, 6), (6, 13), (13, 20))
    few = Run(small(run__method="gpipe", pipeline__micro_batches=64), sizes={"train": 3}).start()
    assert few.items_of(Train)[0].micro_batches == ((0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize("method", ["scpl", "gpipe"])
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_a_resumed_run_handles_the_tail_of_the_undisturbed_one(method: str, every: int) -> None:
    config = small(checkpoint__every_steps=every, run__method=method, pipeline__micro_batches=2)
    whole = Run(config).start().play().items()
    cuts = [item for item in whole if isinstance(item, Checkpoint)]
    assert len(cuts) >= 3
    for cut in cuts:
        resumed = Run(config, resume=cut.position).start().play().items()
        assert without_sequence(resumed) == without_sequence(whole[cut.sequence + 1 :])
        assert resumed[0].sequence == 0


@pytest.mark.parametrize("stopped_after", range(1, 23))
def test_a_stopped_run_goes_on_to_the_same_training_items_and_result(stopped_after: int) -> None:
    whole = Run(window=2).start().play().leave()
    first = Run(window=2).start()
    while len(first.items()) < stopped_after:
        first.now += 1.0
        for stage in first.stages:
            first.done(stage)
    first.event(Signal("launcher", 15))
    first.play().leave()
    if first.end.code == 0:  # everything was under way already
        assert first.items() == whole.items()
        return
    assert first.end.code == 143
    (commit,) = first.only(Commit)
    second = Run(window=2, resume=commit.position).start().play().leave()

    def train(*runs: Run) -> list[Item]:
        return without_sequence(item for run in runs for item in run.items_of(Train))

    assert train(first, second) == train(whole)
    for key in ("accuracies", "steps", "epochs", "best_epoch", "accuracy_last", "samples"):
        assert second.result[key] == whole.result[key], key


def test_stage_0_gets_no_more_than_it_needs_at_its_pace() -> None:
    run = Run(small(run__epochs=1000), window=30).start()
    assert len(run.items()) == 8  # nothing is known yet
    for _ in range(40):
        run.now += 1.0
        run.done(0)
    begun = 39
    assert len(run.items()) - 1 - begun == 2  # slow: two ahead are enough, and a signal is answered soon
    for _ in range(60):
        run.now += 0.001
        run.done(0)
    assert len(run.items()) - 1 - 99 == 30  # fast: as many as the window allows
    before = len(run.items())
    run.beat(0, stats=Stats(begun=110))
    assert len(run.items()) == before + 11  # a heartbeat says what has been begun, too


def test_only_stage_0_is_sent_work() -> None:
    run = Run().start().play()
    assert {send.peers for send in run.sends(Work)} == {(b"peer0",)}


def test_a_finished_run_has_its_numbers() -> None:
    config = small(run__epochs=2)
    run = Run(config).start()
    correct = {(0, "validation"): 9, (0, "test"): 12, (1, "validation"): 6, (1, "test"): 16}
    while (item := run.next_item) is not None:
        run.now += 1.0
        for stage in run.stages:
            run.busy[stage] += 0.5
            if isinstance(item, Evaluate) and stage == 2:
                (begin, end), *_ = item.micro_batches
                right = correct[item.epoch, item.split] if item.last else 0
                run.done(stage, metrics={"accuracy": (right, end - begin)})
            else:
                run.done(stage)
    run.leave()
    assert (run.end.code, run.end.failure) == (0, None)
    result = run.result
    assert result is not None
    assert result["accuracy_last"] == 16 / 20
    assert result["accuracy_best"] == 12 / 20  # of the epoch with the best validation accuracy
    assert (result["best_epoch"], result["selected_by"]) == (0, "validation")
    assert (result["steps"], result["epochs"], result["samples"]) == (6, 2, 100)
    assert result["wall_seconds"] == len(run.items())
    # 1 s an item, without the first step; an epoch has 20 + 20 + 10 samples.
    assert result["samples_per_second"] == (100 - 20) / 5
    assert [row["busy_seconds"] for row in result["per_stage"]] == [run.busy[0]] * 3


def test_without_a_validation_split_the_test_split_selects() -> None:
    run = Run(sizes={"train": 20, "validation": 0, "test": 10}).start().play().leave()
    assert kinds(run.items()) == "tex" * 3 + "cs"
    assert (run.result["selected_by"], run.result["best_epoch"]) == ("test", 0)


def test_every_loss_is_recorded_once_with_its_terms() -> None:
    run = Run().start()
    terms = {"contrastive": 0.1, "other": 0.2}
    run.done(1, losses={"4": terms, "5": {"local": 1.0}})
    rows = run.rows("train")
    assert rows[0] == {
        "event": "train",
        "step": 0,
        "epoch": 0,
        "stage": 1,
        "block": 4,
        "loss": 0.1 + 0.2,
        "terms": terms,
        "lr": run.config.optimizer.lr,
    }
    assert [row["block"] for row in rows] == [4, 5]


@pytest.mark.parametrize("fast_disks", [False, True])  # a writer's report may come before its stage's
def test_a_checkpoint_is_committed_when_the_last_stage_has_written_its_part(fast_disks: bool) -> None:
    run = Run(small(checkpoint__every_steps=1)).start()
    run.fast_disks = fast_disks
    for stage in (2, 0):
        run.done(stage)
        run.done(stage)
    run.done(1)
    assert not run.only(Commit)
    run.done(1)
    (commit,) = run.only(Commit)
    assert (commit.step, commit.epoch, commit.seconds, commit.best) == (1, 0, 3.0, False)
    assert [(file["stage"], file["name"]) for file in commit.files] == [
        (k, f"block-00{k}.pt") for k in range(3)
    ]
    assert {key: commit.position[key] for key in ("epoch", "step", "batch")} == {
        "epoch": 0,
        "step": 1,
        "batch": 1,
    }
    run.event(Committed(1, 9, 3.5))
    assert run.coordinator.checkpoints == 1
    number = run.coordinator.number
    assert run.rows("checkpoint") == [
        {"event": "checkpoint", "step": 1, "bytes": 9, "seconds": 3.5, "event_number": number}
    ]


def test_a_part_of_a_checkpoint_that_nobody_waits_for_is_a_warning() -> None:
    run = Run().start()
    run.tell(1, Written(sequence=0, files=[], seconds=0.1))
    assert "wrote a checkpoint (item 0) that nobody waits for" in run.rows("warning")[0]["text"]


def test_a_checkpoint_that_cannot_be_published_ends_the_run() -> None:
    run = Run().start()
    run.event(NotWritten("checkpoint", "no space left"))
    assert run.failure.cause == "disk"
    assert run.coordinator.checkpoint_failures == 1


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"protocol": 99}, ("99", str(PROTOCOL))),
        ({"version": "9.9"}, ("9.9", VERSION)),
        ({"torch": "1.0"}, ("1.0", "2.14.1")),
        ({"config": "feed"}, ("feed", small().digest())),
        ({"code": "beef"}, ("beef", "")),
    ],
)
def test_a_peer_that_differs_is_refused_with_both_values(
    change: dict[str, Any], values: tuple[str, str]
) -> None:
    run = Run()
    run.hello(0)
    run.hello(1, **change)
    (refusal,) = run.sends(Refuse)
    assert refusal.peers == (b"peer1",)
    assert all(value in str(refusal.message) for value in values)
    assert run.coordinator.rejected["refused"] == 1
    assert run.end.code == 2
    assert run.failure.stage == 1
    assert all(value in run.failure.message for value in values)


def test_strangers_do_not_harm_a_run_whose_stages_are_there() -> None:
    run = Run().start()
    before = len(run.items())
    run.hello(1, peer=b"stranger")
    run.hello(7, peer=b"other")
    for _ in range(100):
        run.hello(2, peer=b"flood", version="0")
    run.event(Received(b"stranger", Done(sequence=0)))
    run.event(Received(b"nobody", Left()))
    run.event(Garbage())
    assert run.outcome is None
    assert +run.coordinator.rejected == {
        "refused": 102,
        "garbage": 2,
    }  # the refused one's message is expected
    assert len(run.warnings()) == 20
    assert len(run.items()) == before


def test_missing_stages_are_named() -> None:
    run = Run()
    run.hello(1)
    run.pass_time(9, beating=[1], phase=Phase.IDLE)
    assert run.outcome is None
    run.pass_time(2, beating=[1], phase=Phase.IDLE)
    assert run.failure.message == "no worker for stage 0, 2 within 10 s"


def test_stage_0_may_take_a_first_step_s_time_to_read_the_data_set() -> None:
    run = Run()
    run.hello(0, described=False)
    for stage in run.stages[1:]:
        run.hello(stage)
    run.pass_time(99, beating=run.stages, phase=Phase.DATA)
    assert run.outcome is None
    assert not run.sent(Start)
    run.pass_time(2, beating=run.stages, phase=Phase.DATA)
    assert run.failure.message == "stage 0 has not read the data set within 100 s"


def test_the_run_starts_when_the_data_set_is_described() -> None:
    run = Run()
    run.hello(0, described=False)
    for stage in run.stages[1:]:
        run.hello(stage)
    run.describe()
    assert run.sent(Start)


def test_a_stage_that_is_never_ready_is_named() -> None:
    run = Run()
    for stage in run.stages:
        run.hello(stage)
    for stage in (0, 2):
        run.tell(stage, Ready())
    run.pass_time(99, beating=run.stages, phase=Phase.STARTING)
    assert run.outcome is None
    run.pass_time(2, beating=run.stages, phase=Phase.STARTING)
    assert (run.failure.stage, run.failure.cause) == (1, "missing")


def test_a_silent_stage_is_found_by_its_silence() -> None:
    run = Run().start()
    run.beat(1, Phase.BACKWARD, step=3, micro_batch=2)
    run.pass_time(9, beating=[0, 2], phase=Phase.RECEIVE)
    assert run.outcome is None
    run.pass_time(2, beating=[0, 2], phase=Phase.RECEIVE)
    failure = run.failure
    assert (failure.cause, failure.stage, failure.host, failure.rank, failure.pid) == (
        "silent",
        1,
        "host1",
        1,
        101,
    )
    assert (failure.phase, failure.step, failure.micro_batch) == ("backward", 3, 2)


def test_a_hung_stage_is_found_although_its_heart_beats() -> None:
    run = Run().start().play(until=lambda item: True)
    run.beat(1, Phase.BACKWARD, step=1)
    for stage in (0, 2):
        run.beat(stage, Phase.RECEIVE)

    def wait(seconds: float) -> None:
        end = run.now + seconds
        while run.now < end and run.outcome is None:
            run.now += 0.5
            run.beat(1, Phase.BACKWARD, step=1)
            run.beat(0, Phase.ROOM)
            run.beat(2, Phase.RECEIVE)
            run.event(Tick())

    wait(9.5)
    assert run.outcome is None
    wait(1)
    assert (run.failure.cause, run.failure.stage) == ("hang", 1)


def test_the_first_item_of_a_kind_has_the_longer_limit() -> None:
    run = Run().start()
    run.pass_time(50, beating=run.stages)
    assert run.outcome is None
    run.pass_time(51, beating=run.stages)
    run = Run().start().play(until=lambda item: isinstance(item, EpochEnd))
    run.pass_time(50, beating=run.stages, phase=Phase.EVALUATE)
    assert run.outcome is None, "the first evaluation may take as long as the first step"


def test_progress_within_an_item_is_progress() -> None:
    run = Run().start().play(until=lambda item: True)
    for micro_batch in range(10):
        run.now += 9.0
        for stage in run.stages:
            run.beat(stage, Phase.FORWARD, micro_batch=micro_batch)
        run.event(Tick())
    assert run.outcome is None


def test_stages_that_only_wait_for_each_other_are_a_deadlock() -> None:
    run = Run().start()
    run.pass_time(9, beating=run.stages, phase=Phase.RECEIVE)
    assert run.outcome is None
    run.pass_time(2, beating=run.stages, phase=Phase.RECEIVE)
    assert run.failure.cause == "deadlock"


def test_a_coordinator_that_was_stopped_blames_nobody() -> None:
    run = Run().start()
    run.pass_time(1, beating=run.stages)
    run.now += 3600
    run.event(Tick())
    assert run.outcome is None
    run.pass_time(5, beating=run.stages)
    assert run.outcome is None
    (warning,) = run.rows("warning")
    assert "the coordinator did not run for 3600.0 s" in warning["text"]


def test_a_pause_is_no_time_for_a_checkpoint_under_way_either() -> None:
    run = Run(small(checkpoint__every_steps=1)).start()
    run.play(until=at_step(1))
    assert run.coordinator.flow is not None
    assert run.coordinator.flow.checkpoints.pending
    run.now += 3600
    run.pass_time(5, beating=run.stages)
    assert run.outcome is None
    run.pass_time(10, beating=run.stages)
    assert "publishing the checkpoint" in run.failure.message


def test_workers_that_left_a_coordinator_that_was_stopped_are_not_to_blame() -> None:
    run = Run().start()
    run.pass_time(1, beating=run.stages)
    run.now += 30  # with a time-out of 10 s
    run.event(Unreachable(b"peer0", Alive()))
    run.pass_time(2)
    assert (run.failure.cause, run.failure.stage) == ("coordinator_lost", None)
    assert "did not run for 30.0 s" in run.failure.message


def test_a_death_long_after_a_pause_has_nothing_to_do_with_it() -> None:
    run = Run().start()
    run.now += 30
    run.pass_time(5, beating=run.stages)
    run.exited(1, -signal.SIGKILL)
    assert (run.failure.cause, run.failure.stage) == ("died", 1)


def test_the_first_primary_cause_wins_over_deaths() -> None:
    run = Run().start()
    run.tell(0, Failed(cause=Cause.PEER_LOST, message="eof", peer=1))
    run.exited(1, 1)
    run.now += 1.0
    trace = 'File "model.py", line 3'
    report = Failed(cause=Cause.RAISED, message="ValueError: no", traceback=trace, phase=Phase.LOSS, step=4)
    run.tell(1, report)
    failure = run.failure
    assert (failure.cause, failure.stage, failure.traceback, failure.phase) == ("raised", 1, trace, "loss")
    assert run.tell(2, Failed(cause=Cause.RAISED, message="later")) == []


def test_a_death_waits_for_a_report_and_then_counts() -> None:
    run = Run().start()
    run.beat(1, Phase.FORWARD, step=5, micro_batch=1)
    run.tell(2, Failed(cause=Cause.PEER_LOST, message="eof", peer=1))
    run.pass_time(1.25, beating=[0])
    assert run.outcome is None
    run.pass_time(0.5, beating=[0])
    failure = run.failure
    assert failure.stage == 1
    assert "host1, pid 101" in failure.message
    assert "last seen in forward at step 5, micro-batch 1" in failure.message


@pytest.mark.parametrize(
    "events",
    [
        # a chain of complaints: 2 dies, 1 complains about it and ends, 0 complains about 1
        [("lost", 1, 2), ("lost", 0, 1), ("exited", 0, 1), ("exited", 1, 1), ("exited", 2, -9)],
        [("lost", 0, 1), ("lost", 1, 2), ("exited", 2, -9)],
        # whoever started the workers kills the others and reports in the order of the ranks
        [("gone", 2, 0), ("exited", 0, -15), ("exited", 1, -9), ("exited", 2, -9)],
        [("exited", 2, -9)],
    ],
)
def test_the_stage_that_died_first_is_the_culprit(events: list[tuple[str, int, int]]) -> None:
    run = Run().start()
    for kind, stage, value in events:
        run.now += 0.1
        if kind == "lost":
            run.tell(stage, Failed(cause=Cause.PEER_LOST, message="eof", peer=value))
        elif kind == "gone":
            run.event(Unreachable(b"peer%d" % stage, Alive()))
        else:
            run.exited(stage, value)
    run.pass_time(2)
    assert run.failure.stage == 2
    assert run.end.code == 1


def test_a_kill_is_conclusive_and_an_exit_code_is_not() -> None:
    for code in (signal.SIGKILL, signal.SIGSEGV):
        run = Run().start()
        run.exited(1, -code)
        assert (run.failure.cause, run.failure.stage) == ("died", 1)
        assert f"killed by {code.name}" in run.failure.message
    for status in (1, -signal.SIGTERM, -signal.SIGINT):
        run = Run().start()
        run.exited(1, status)
        assert run.outcome is None, "its report may be on the way"
        run.tell(1, Failed(cause=Cause.RAISED, message="ValueError: no"))
        assert (run.failure.cause, run.failure.stage) == ("raised", 1)


def test_who_misses_a_rank_that_is_not_there_is_the_one_that_is_wrong() -> None:
    run = Run().start()
    run.tell(1, Failed(cause=Cause.PEER_LOST, message="connection to rank 7 broke", peer=7))
    run.pass_time(2)
    assert run.failure.stage == 1
    assert "connection to rank 7 broke" in run.failure.message


def test_a_kill_brings_the_verdict_about_whoever_was_suspected_first() -> None:
    run = Run().start()
    run.tell(0, Failed(cause=Cause.PEER_LOST, message="eof", peer=1))
    run.exited(0, -signal.SIGKILL)
    assert (run.failure.cause, run.failure.stage) == ("unreachable", 1)


def test_a_connection_that_heals_is_no_death() -> None:
    run = Run().start()
    run.event(Unreachable(b"peer1", Alive()))
    run.now += 1
    run.beat(1)
    run.pass_time(3, beating=run.stages)
    assert run.outcome is None


def test_a_worker_that_missed_a_message_is_lost_though_its_connection_heals() -> None:
    run = Run().start()
    sent = len(run.items())
    run.event(Unreachable(b"peer0", Work(items=[])))
    run.beat(0)
    run.done(0)
    assert len(run.items()) == sent  # no more work: stage 0 would take it for the next one
    run.pass_time(2, beating=run.stages)
    assert (run.failure.cause, run.failure.stage) == ("unreachable", 0)
    assert "a message to it was lost with its connection" in run.failure.message


def test_who_has_left_and_misses_a_sign_of_life_is_no_loss_but_one_that_misses_more_is() -> None:
    run = Run().start().play()
    run.tell(0, Left())
    run.event(Unreachable(b"peer0", Alive()))
    run.pass_time(2, beating=run.stages)
    assert run.outcome is None
    run.event(Unreachable(b"peer0", Regroup(reason="loss")))
    run.pass_time(2, beating=run.stages)
    assert (run.failure.cause, run.failure.stage) == ("unreachable", 0)


def test_a_worker_that_ends_before_its_hello_is_named_by_rank() -> None:
    run = Run()
    run.hello(0)
    run.exited(2, 1)
    run.pass_time(2, beating=[0])
    assert run.failure.rank == 2
    assert "exit code 1" in run.failure.message


def test_workers_that_exit_after_their_work_are_no_failure() -> None:
    run = Run().start().play().publish()
    for rank in run.stages:
        run.exited(rank, 0)  # their "left" was lost, say
    assert run.end.code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(value: float) -> None:
    run = Run().start()
    run.done(2, losses={"2": {"local": value}})
    assert (run.failure.cause, run.failure.stage) == ("nonfinite", 2)
    assert run.coordinator.nonfinite_losses == 1
    assert not run.rows("train")


def test_an_item_out_of_order_ends_the_run() -> None:
    run = Run().start()
    run.tell(1, Done(sequence=1))
    assert run.failure.cause == "protocol"


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130)])
def test_a_signal_cuts_the_run_with_a_checkpoint(number: int, code: int) -> None:
    run = Run(window=2).start().play(until=at_step(1))
    sent = len(run.items())
    run.event(Signal("launcher", number))
    assert kinds(run.items()[sent:]) == "cs"
    for stage in run.stages:  # every process of the group gets the signal: that is still one signal
        run.tell(stage, StopRequested(signal=number))
    run.play().leave()
    assert (run.end.code, run.end.result) == (code, None)
    assert len(run.only(Commit)) == 1


def test_a_second_signal_ends_the_run_at_once() -> None:
    run = Run().start()
    run.event(Signal("launcher", 2))
    assert run.outcome is None
    run.event(Signal("launcher", 2))
    assert run.end.code == 130
    assert isinstance(run.only(Send)[-1].message, Abort)


def test_before_the_first_step_a_signal_to_all_stops_and_a_signal_to_some_may_follow_a_death() -> None:
    run = Run()
    for stage in run.stages:
        run.hello(stage)
    for stage in run.stages:
        run.tell(stage, StopRequested(signal=15))
    assert run.end.code == 143
    run = Run()
    for stage in (0, 1):
        run.hello(stage)
        run.tell(stage, StopRequested(signal=15))
    run.now += 2
    run.exited(2, 1)
    run.pass_time(2, beating=[0, 1])
    assert run.failure.rank == 2


def test_a_stop_that_was_asked_for_while_the_stages_get_ready_is_not_forgotten() -> None:
    run = Run()
    for stage in run.stages:
        run.hello(stage)
    run.tell(1, StopRequested(signal=15))
    run.ready()
    assert (run.end.code, run.items()) == (143, [])


def test_before_the_first_step_a_signal_that_follows_a_death_is_not_the_reason() -> None:
    run = Run()
    run.hello(1)
    run.exited(1, -9)
    for rank in (0, 2):  # still loading, so they die of the signal with which the launcher ends them
        run.exited(rank, -15)
    run.pass_time(2, beating=[])
    assert (run.failure.cause, run.failure.stage) == ("died", 1)


def test_the_death_of_the_launcher_ends_the_run() -> None:
    run = Run().start()
    run.event(LauncherLost())
    assert run.end.code == 1


def test_a_straggler_is_reported_once_after_20_slow_steps() -> None:
    run = Run(small(run__epochs=20)).start()
    for step in range(60):
        if isinstance(run.next_item, Train):
            for stage in run.stages:
                run.busy[stage] += 0.5 if stage == 1 else 0.1
        for stage in run.stages:
            run.done(stage)
        warned = run.warnings()
        slow_steps = sum(isinstance(item, Train) for item in run.items()[: step + 1])
        assert len(warned) == (slow_steps >= 20)
    assert "stage 1" in warned[0]
    assert run.coordinator.members[1].stragglings == 1


def test_equal_stages_are_no_stragglers() -> None:
    run = Run(small(run__epochs=20)).start()
    for _ in range(100):
        for stage in run.stages:
            run.busy[stage] += 0.1 + 0.05 * stage
            run.done(stage)
    assert not run.warnings()


def test_the_coordinator_says_each_second_that_it_lives() -> None:
    run = Run().start()
    run.pass_time(5, beating=run.stages)
    assert len(run.sent(Alive)) == 5


def test_a_position_from_another_data_set_is_refused() -> None:
    run = Run(resume={"epoch": 1, "step": 7, "batch": 0})
    for stage in run.stages:
        run.hello(stage)
    assert run.end.code == 2
    assert "step 7" in run.failure.message


def test_a_sequence_of_items_needs_training_samples() -> None:
    with pytest.raises(ValueError, match="no training samples"):
        ItemSequence(small(), {"train": 0, "test": 5})


def test_commands_and_rows_carry_the_number_of_their_event() -> None:
    run = Run(small(checkpoint__every_steps=1)).start()
    (start,) = run.rows("start")
    assert (
        start["event_number"] == run.coordinator.number == 10
    )  # three hellos, the data set, three times built and ready
    run.play(until=lambda item: isinstance(item, Evaluate) and item.last)
    run.hello(1, peer=b"stranger")
    run.publish()
    by_number = {command.cause: command for command in run.commands}
    for event in ("warning", "eval", "checkpoint"):
        assert run.rows(event)
        assert all(row["event_number"] in by_number for row in run.rows(event))
    assert run.rows("warning")[0]["event_number"] == run.coordinator.number - len(run.only(Commit))
    assert all("event_number" not in row for row in run.rows("train"))


def test_a_marker_that_takes_no_time_says_nothing_of_the_pace() -> None:
    run = Run(small(checkpoint__every_steps=1, run__epochs=20)).start()
    for _ in range(6):
        run.now += 2.0 if isinstance(run.next_item, Train | Evaluate) else 0.0
        for stage in run.stages:
            run.done(stage)
    assert len(run.items()) <= 6 + 8


@pytest.mark.parametrize(
    "change",
    [
        lambda run: setattr(run.coordinator.members[1], "done", 99),
        lambda run: setattr(run.coordinator.members[1], "ready", False),
        lambda run: setattr(run.coordinator.members[1], "peer", b"peer0"),
        lambda run: run.coordinator.members.pop(1),
        lambda run: run.coordinator.flow.window.open.pop(0),
        lambda run: setattr(run.coordinator, "state", "over"),
    ],
    ids=["done", "ready", "peer", "members", "window", "state"],
)
def test_a_state_that_cannot_be_is_noticed(change: Callable[[Run], object]) -> None:
    run = Run().start()
    change(run)
    with pytest.raises(AssertionError):
        invariants.check(run.coordinator)
