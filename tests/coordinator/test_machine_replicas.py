"""The coordinator's rules where stages have several workers: two of stage 0, one of stage 1, two of stage 2."""

from __future__ import annotations

import pytest

from scpl_dist.control.items import Checkpoint, Evaluate, Item
from scpl_dist.control.messages import Failed, Heartbeat, Left, Refuse, Start, Stats, Work
from scpl_dist.coordinator.events import Commit, Tick
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.metrics import RunCollector
from scpl_dist.coordinator.status import snapshot
from scpl_dist.run.failures import Cause
from scpl_dist.run.phases import Phase
from scpl_dist.run.scores import Sum
from tests.support import coordinator
from tests.support.coordinator import small

PLACES = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]


class Run(coordinator.Run):
    """A coordinator with the five workers."""

    def __init__(self) -> None:
        super().__init__(small(pipeline__replicas=[2, 1, 2], checkpoint__every_steps=2))
        assert self.places == PLACES

    def stats(self, item: Item, stage: int, replica: int) -> Stats:
        return Stats(busy=2.0, bytes_sent=10, queue=replica, peak_memory=5 + replica, begun=item.sequence)

    def answers(self, item: Evaluate, replica: int) -> dict[str, Sum]:
        begin, end = item.micro_batches[0]
        return {"accuracy": (1 + replica, (end - begin) // 2)}


def test_a_run_waits_for_all_workers_and_tells_each_where_the_others_are() -> None:
    run = Run()
    for place in PLACES[:4]:
        run.hello(*place)
    assert not run.sends(Start)
    run.hello(*PLACES[4])
    start, *_ = run.sends(Start)
    assert isinstance(start.message, Start)
    assert [endpoint["rank"] for endpoint in start.message.endpoints] == [0, 1, 2, 3, 4]
    assert [send.message.rank for send in run.sends(Start) if isinstance(send.message, Start)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_whole_run_counts_every_step_and_sample_once_and_adds_up_the_answers() -> None:
    run = Run().start().play().leave()
    result = run.result
    assert (result["steps"], result["samples"]) == (9, 150)
    # Two workers of the last stage: 1 and 2 right answers of 10 each in both batches of 20, or of 20 and 10 samples.
    assert result["accuracies"][0] == {"epoch": 0, "validation": 6 / 30, "test": 3 / 20}
    places = [(row["stage"], row["replica"]) for row in result["per_stage"]]
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    train = [(row["step"], row["stage"]) for row in run.rows("train")]
    assert sorted(train) == [(step, stage) for step in range(9) for stage in range(3)]


def test_both_workers_of_stage_0_get_the_same_items_at_the_pace_of_the_slower_one() -> None:
    run = Run().start()
    first = len(run.items())
    for replica, grown in ((0, False), (1, True)):
        for _ in range(first):
            run.now += 1.0
            run.done(0, replica)
        assert (len(run.items()) > first) is grown
    assert {frozenset(send.peers) for send in run.sends(Work)} == {frozenset((b"peer0", b"peer0.1"))}


def test_a_checkpoint_needs_one_part_of_each_stage_and_the_marker_to_have_passed_all() -> None:
    run = Run().start()
    while not isinstance(run.next_item, Checkpoint):
        for place in PLACES:
            run.done(*place)
    for place in PLACES[:4]:
        run.done(*place)
    assert not run.only(Commit)
    run.done(*PLACES[4])
    assert [commit.step for commit in run.only(Commit)] == [2]


@pytest.mark.parametrize(
    ("place", "reason"),
    [((1, 1), "rank 91 does not exist"), ((2, 0), "stage 2.0 is taken by rank 2")],
)
def test_a_worker_without_a_place_is_refused(place: tuple[int, int], reason: str) -> None:
    run = Run()
    run.hello(2)
    run.hello(*place, peer=b"another")
    (refusal,) = run.sent(Refuse)
    assert reason in refusal.reason


def test_a_worker_has_one_place() -> None:
    run = Run()
    run.hello(2)
    run.hello(1, peer=coordinator.peer_of(2))
    (refusal,) = run.sent(Refuse)
    assert "said hello before" in refusal.reason


def test_the_dead_replica_is_to_blame_and_not_the_one_that_missed_it() -> None:
    run = Run().start()
    run.tell(2, Failed(cause=Cause.PEER_LOST, message="connection to a replica broke", peer=4))
    run.exited(4, -9)
    run.now += 2
    run.tell(0, Heartbeat(phase=Phase.FORWARD))
    run.event(Tick())
    failure = run.failure
    assert (failure.stage, failure.replica, failure.rank, failure.cause) == (2, 1, 4, "died")
    assert failure.message.startswith("stage 2.1 (host4, pid 104) died")


def test_the_coordinator_calls_a_worker_as_it_calls_itself() -> None:
    run = Run().start()
    members = run.coordinator.members
    labels = [f"stage {worker.label}" for worker in run.coordinator.layout.workers]
    assert [members[rank].name for rank in range(5)] == labels
    assert labels == ["stage 0.0", "stage 1", "stage 2.0", "stage 0.1", "stage 2.1"]


def by_stage(collector: RunCollector) -> dict[tuple[str, str], float]:
    """Values by name and stage."""
    return {
        (sample.name, sample.labels["stage"]): sample.value
        for family in collector.collect()
        for sample in family.samples
        if "stage" in sample.labels
    }


def test_metrics_are_of_stages_and_add_up_their_workers() -> None:
    run = Run().start().play(until=lambda item: isinstance(item, Evaluate))
    collector = RunCollector(lambda: snapshot(run.coordinator, run.now))
    found = by_stage(collector)
    assert found["scpl_stage_replicas", "2"] == 2
    assert found["scpl_stage_up", "2"] == 1
    assert found["scpl_stage_busy_seconds_total", "2"] == 4.0
    assert found["scpl_stage_busy_seconds_total", "1"] == 2.0
    assert found["scpl_transport_sent_bytes_total", "0"] == 20
    assert found["scpl_queue_depth", "0"] == 1
    assert found["scpl_memory_peak_bytes", "2"] == 6
    run.tell(2, Left(), replica=1)
    found = by_stage(collector)
    assert (found["scpl_stage_up", "2"], found["scpl_stage_replicas", "2"]) == (0, 1)


@pytest.mark.parametrize(
    ("size", "total", "batches"),
    [(20, 41, [(0, 20), (20, 41)]), (20, 42, [(0, 20), (20, 40), (40, 42)]), (20, 20, [(0, 20)])],
)
def test_no_evaluation_batch_is_too_small_for_the_replicas(
    size: int, total: int, batches: list[tuple[int, int]]
) -> None:
    config = small(pipeline__replicas=[1, 2, 1], data__batch_size=size)
    sequence = ItemSequence(config, {"train": 50, "test": total})
    items = [item for item in iter(sequence.next, None) if isinstance(item, Evaluate) and item.epoch == 0]
    assert [item.micro_batches for item in items] == [(batch,) for batch in batches]
    assert [item.last for item in items] == [False] * (len(batches) - 1) + [True]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 41, "test": 20}, "the last micro-batch of an epoch has 1 sample"),
        ({"train": 40, "test": 1}, "replicas share each micro-batch, and test has fewer"),
    ],
)
def test_too_few_samples_for_the_replicas_are_an_error(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemSequence(small(pipeline__replicas=2), sizes)
