"""The coordinator's rules where stages have several workers: two of stage 0, one of stage 1, two of stage 2."""

from __future__ import annotations

from typing import Any

import pytest

from scpl_dist.control.messages import (
    PROTOCOL,
    VERSION,
    Dataset,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Left,
    Message,
    Ready,
    Start,
    Stats,
    Work,
    Written,
)
from scpl_dist.coordinator.events import (
    Commit,
    Committed,
    Event,
    Exited,
    Finish,
    Received,
    Record,
    Send,
    Tick,
)
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.metrics import RunCollector
from scpl_dist.coordinator.status import snapshot
from scpl_dist.run.failures import Outcome
from tests.coordinator.test_machine import SIZES, small

SEATS = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]


class Run:
    """A coordinator with the five workers."""

    def __init__(self) -> None:
        self.config = small(pipeline__replicas=[2, 1, 2], checkpoint__every_steps=2)
        self.coordinator = Coordinator(self.config, "g1")
        self.now = 1000.0
        self.commands: list[Any] = []
        self.finished = dict.fromkeys(SEATS, 0)

    def event(self, event: Event) -> None:
        self.commands += self.coordinator.handle(event, self.now)

    def tell(self, worker_id: tuple[int, int], message: Message) -> None:
        self.event(Received(b"peer%d.%d" % worker_id, message))

    def hello(self, worker_id: tuple[int, int], **changes: Any) -> None:
        rank = SEATS.index(worker_id)
        fields: dict[str, Any] = {
            "protocol": PROTOCOL,
            "version": VERSION,
            "torch": "2",
            "stages": 3,
            "rank": rank,
        }
        fields |= {
            "stage": worker_id[0],
            "replica": worker_id[1],
            "config": self.config.digest(),
            "host": f"host{rank}",
        }
        fields |= {"pid": 100 + rank, "device": "cpu", "endpoint": {"rank": rank}}
        fields |= {"data": Dataset(classes=10, sizes=SIZES) if worker_id == (0, 0) else None}
        self.tell(worker_id, Hello(**fields | changes))

    def start(self) -> Run:
        for worker_id in reversed(SEATS):
            self.hello(worker_id)
        for worker_id in SEATS:
            self.tell(worker_id, Ready(stage=worker_id[0], replica=worker_id[1], blocks=1 + worker_id[0]))
        return self

    def sent(self, kind: type[Message]) -> list[Send]:
        return [c for c in self.commands if isinstance(c, Send) and isinstance(c.message, kind)]

    def items(self) -> list[dict[str, Any]]:
        return [item for send in self.sent(Work) for item in send.message.items]  # type: ignore[attr-defined]

    def done(self, worker_id: tuple[int, int]) -> None:
        item = self.items()[self.finished[worker_id]]
        self.finished[worker_id] += 1
        fields: dict[str, Any] = {
            "stage": worker_id[0],
            "replica": worker_id[1],
            "sequence": item["sequence"],
        }
        fields |= {"kind": item["kind"], "epoch": item.get("epoch", 0), "step": item.get("step", 0)}
        if item["kind"] == "train":
            samples = item["micro_batches"][-1][1] - item["micro_batches"][0][0]
            fields |= {"samples": samples, "losses": {str(worker_id[0]): {"local": 1.0 + worker_id[0]}}}
        elif item["kind"] == "evaluate" and worker_id[0] == 2:
            begin, end = item["micro_batches"][0]
            fields |= {"split": item["split"], "correct": 1 + worker_id[1], "total": (end - begin) // 2}
        stats = Stats(
            busy=2.0, bytes_sent=10, queue=worker_id[1], peak_memory=5 + worker_id[1], begun=item["sequence"]
        )
        self.tell(worker_id, Done(**fields | {"stats": stats}))
        if item["kind"] == "checkpoint" and worker_id[1] == 0:
            self.tell(
                worker_id, Written(stage=worker_id[0], sequence=item["sequence"], files=[], seconds=1.0)
            )

    def play(self, epochs: int = 3) -> Run:
        while (
            self.finished[0, 0] < len(self.items())
            and self.items()[self.finished[0, 0]].get("epoch", 0) < epochs
        ):
            self.now += 1.0
            for worker_id in SEATS:
                self.done(worker_id)
            for commit in [command for command in self.commands if isinstance(command, Commit)]:
                self.event(Committed(commit.step, 0, 0.0))
        return self

    @property
    def outcome(self) -> Outcome:
        (found,) = [command.outcome for command in self.commands if isinstance(command, Finish)]
        assert isinstance(found, Outcome)
        return found


def test_a_run_waits_for_all_workers_and_tells_each_where_the_others_are() -> None:
    run = Run()
    for worker_id in SEATS[:4]:
        run.hello(worker_id)
    assert not run.sent(Start)
    run.hello(SEATS[4])
    (start,) = run.sent(Start)
    assert isinstance(start.message, Start)
    assert [endpoint["rank"] for endpoint in start.message.endpoints] == [0, 1, 2, 3, 4]
    assert len(start.peers) == 5


def test_a_whole_run_counts_every_step_and_sample_once_and_adds_up_the_answers() -> None:
    run = Run().start().play()
    for stage, replica in SEATS:
        run.tell((stage, replica), Left(stage=stage, replica=replica))
    result = run.outcome.result
    assert result is not None
    assert (result["steps"], result["samples"]) == (9, 150)
    # Two workers of the last stage: 1 and 2 right answers of 10 each in both batches of 20, or of 20 and 10 samples.
    assert result["accuracies"][0] == {"epoch": 0, "validation": 6 / 30, "test": 3 / 20}
    places = [(row["stage"], row["replica"]) for row in result["per_stage"]]
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    rows = [command.row for command in run.commands if isinstance(command, Record)]
    train = [(row["step"], row["stage"]) for row in rows if row["event"] == "train"]
    assert sorted(train) == [(step, stage) for step in range(9) for stage in range(3)]


def test_both_workers_of_stage_0_get_the_same_items_at_the_pace_of_the_slower_one() -> None:
    run = Run().start()
    first = len(run.items())
    for worker_id, grown in (((0, 0), False), ((0, 1), True)):
        for _ in range(first):
            run.now += 1.0
            run.done(worker_id)
        assert (len(run.items()) > first) is grown
    assert {frozenset(send.peers) for send in run.sent(Work)} == {frozenset((b"peer0.0", b"peer0.1"))}


def test_a_checkpoint_needs_one_part_of_each_stage_and_the_marker_to_have_passed_all() -> None:
    run = Run().start()
    while run.items()[run.finished[0, 0]]["kind"] != "checkpoint":
        for worker_id in SEATS:
            run.done(worker_id)
    for worker_id in SEATS[:4]:
        run.done(worker_id)
    assert not [command for command in run.commands if isinstance(command, Commit)]
    run.done(SEATS[4])
    assert [command.step for command in run.commands if isinstance(command, Commit)] == [2]


@pytest.mark.parametrize(
    ("worker_id", "changes", "reason"),
    [
        ((2, 1), {"stage": 1, "replica": 1}, "stage 1 replica 1 does not exist"),
        ((2, 1), {"replica": 0}, "stage 2 is taken by rank 2"),
    ],
)
def test_a_worker_without_a_place_is_refused(
    worker_id: tuple[int, int], changes: dict[str, Any], reason: str
) -> None:
    run = Run()
    run.hello((2, 0))
    run.hello(worker_id, **changes)
    (refusal,) = [
        send.message for send in run.commands if isinstance(send, Send) and send.message.type == "refuse"
    ]
    assert reason in refusal.reason  # type: ignore[attr-defined]


def test_the_dead_replica_is_to_blame_and_not_the_one_that_missed_it() -> None:
    run = Run().start()
    lost = {"cause": "peer_lost", "message": "connection to a replica broke", "peer": 4}
    run.tell((2, 0), Failed(stage=2, **lost))  # type: ignore[arg-type]
    run.event(Exited(4, -9))
    run.now += 2
    run.tell((0, 0), Heartbeat(stage=0, phase="forward"))
    run.event(Tick())
    failure = run.outcome.failure
    assert failure is not None
    assert (failure.stage, failure.replica, failure.rank, failure.cause) == (2, 1, 4, "died")
    assert failure.message.startswith("stage 2 replica 1 (host4, pid 104) died")


def by_stage(collector: RunCollector) -> dict[tuple[str, str], float]:
    """Values by name and stage."""
    return {
        (sample.name, sample.labels["stage"]): sample.value
        for family in collector.collect()
        for sample in family.samples
        if "stage" in sample.labels
    }


def test_metrics_are_of_stages_and_add_up_their_workers() -> None:
    run = Run().start().play(epochs=1)
    collector = RunCollector(lambda: snapshot(run.coordinator, run.now))
    found = by_stage(collector)
    assert found["scpl_stage_replicas", "2"] == 2
    assert found["scpl_stage_up", "2"] == 1
    assert found["scpl_stage_busy_seconds_total", "2"] == 4.0
    assert found["scpl_stage_busy_seconds_total", "1"] == 2.0
    assert found["scpl_transport_sent_bytes_total", "0"] == 20
    assert found["scpl_queue_depth", "0"] == 1
    assert found["scpl_memory_peak_bytes", "2"] == 6
    run.tell((2, 1), Left(stage=2, replica=1))
    found = by_stage(collector)
    assert (found["scpl_stage_up", "2"], found["scpl_stage_replicas", "2"]) == (0, 1)


@pytest.mark.parametrize(
    ("size", "total", "batches"),
    [(20, 41, [[0, 20], [20, 41]]), (20, 42, [[0, 20], [20, 40], [40, 42]]), (20, 20, [[0, 20]])],
)
def test_no_evaluation_batch_is_too_small_for_the_replicas(
    size: int, total: int, batches: list[list[int]]
) -> None:
    config = small(pipeline__replicas=[1, 2, 1], data__batch_size=size)
    agenda = ItemSequence(config, {"train": 50, "test": total})
    items = [item for item in iter(agenda.next, None) if item["kind"] == "evaluate" and item["epoch"] == 0]
    assert [item["micro_batches"] for item in items] == [[batch] for batch in batches]
    assert [item["last"] for item in items] == [False] * (len(batches) - 1) + [True]


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
