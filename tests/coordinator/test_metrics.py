"""The metrics: the exact set of names, and the values of a real run."""

from __future__ import annotations

from dataclasses import replace

from scpl_dist.control.items import Train
from scpl_dist.control.messages import VERSION, Stats
from scpl_dist.coordinator.events import Committed, NotWritten
from scpl_dist.coordinator.metrics import NAMES, RunCollector
from scpl_dist.coordinator.status import snapshot
from scpl_dist.run.phases import Phase
from tests.support.coordinator import Run, at_step

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(run: Run) -> Samples:
    """What a scrape of the run would show, at 5000 s by the wall clock, after two restarts."""
    collector = RunCollector(lambda: snapshot(run.coordinator, run.now, {"died": 2}), lambda: 5000.0)
    return {(s.name, frozenset(s.labels.items())): s.value for f in collector.collect() for s in f.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_the_names_are_exactly_these() -> None:
    assert set(NAMES) == {
        "scpl_run_info",
        "scpl_stage_info",
        "scpl_stage_up",
        "scpl_stage_replicas",
        "scpl_stage_last_progress_timestamp_seconds",
        "scpl_step",
        "scpl_epoch",
        "scpl_loss",
        "scpl_accuracy_ratio",
        "scpl_eval_loss",
        "scpl_learning_rate",
        "scpl_samples_total",
        "scpl_microbatches_total",
        "scpl_stage_phase_seconds_total",
        "scpl_stage_busy_seconds_total",
        "scpl_stage_waiting_seconds_total",
        "scpl_stage_blocked_seconds_total",
        "scpl_block_seconds_total",
        "scpl_queue_depth",
        "scpl_transport_sent_bytes_total",
        "scpl_transport_received_bytes_total",
        "scpl_memory_peak_bytes",
        "scpl_checkpoint_last_success_timestamp_seconds",
        "scpl_checkpoint_duration_seconds",
        "scpl_checkpoint_size_bytes",
        "scpl_checkpoints_total",
        "scpl_checkpoint_failures_total",
        "scpl_restarts_total",
        "scpl_nonfinite_loss_total",
        "scpl_stragglers_total",
        "scpl_control_rejected_total",
        "scpl_samples_per_second",
    }


def test_a_run_shows_every_name_and_no_other_label() -> None:
    run = Run().start().play()
    run.event(Committed(9, 1234, 0.5))
    run.leave()
    found: dict[str, set[frozenset[str]]] = {}
    for name, labels in samples(run):
        found.setdefault(name, set()).add(frozenset(label for label, _ in labels))
    assert set(found) == set(NAMES)
    for name, (_, names, _) in NAMES.items():
        assert found[name] == {frozenset(names)}, name
    for family in RunCollector(lambda: snapshot(run.coordinator, run.now)).collect():
        assert (family.type == "counter") == all(sample.name.endswith("_total") for sample in family.samples)


def test_values_are_those_of_the_run() -> None:
    run = Run().start().play(until=at_step(4))
    stats = Stats(
        busy=3.0, waiting=2.0, blocked=1.0, queue=2, bytes_sent=10, bytes_received=20, peak_memory=30
    )
    stats = replace(stats, phases={Phase.FORWARD: 1.5, Phase.EVALUATE: 0.5})
    run.beat(1, Phase.FORWARD, step=5, epoch=1, stats=stats)
    run.event(Committed(5, 1234, 0.5))
    run.now += 10.0
    found = samples(run)
    expected = {
        key("scpl_run_info", method="scpl", version=VERSION): 1,
        key("scpl_stage_info", stage="1", host="host1", device="cpu"): 1,
        key("scpl_stage_up", stage="1"): 1,
        key("scpl_stage_last_progress_timestamp_seconds", stage="1"): 5000 - 10,
        key("scpl_step", stage="1"): 5,
        key("scpl_loss", stage="1", block="1"): 2.0,
        key("scpl_accuracy_ratio", split="validation"): 0.5,
        key("scpl_eval_loss", split="validation"): 0.25,
        key("scpl_learning_rate"): run.items_of(Train)[4].schedule["lr"],
        key("scpl_samples_total"): 90,
        key("scpl_microbatches_total", stage="2", kind="train"): 5,
        key("scpl_microbatches_total", stage="2", kind="evaluate"): 3,
        key("scpl_stage_phase_seconds_total", stage="1", phase="forward"): 1.5,
        key("scpl_stage_phase_seconds_total", stage="1", phase="evaluate"): 0.5,
        key("scpl_stage_phase_seconds_total", stage="1", phase="send"): 0,
        key("scpl_stage_busy_seconds_total", stage="1"): 3,
        key("scpl_stage_waiting_seconds_total", stage="1"): 2,
        key("scpl_stage_blocked_seconds_total", stage="1"): 1,
        key("scpl_queue_depth", stage="1"): 2,
        key("scpl_transport_sent_bytes_total", stage="1"): 10,
        key("scpl_transport_received_bytes_total", stage="1"): 20,
        key("scpl_memory_peak_bytes", stage="1"): 30,
        key("scpl_checkpoints_total"): 1,
        key("scpl_checkpoint_size_bytes"): 1234,
        key("scpl_checkpoint_duration_seconds"): 0.5,
        key("scpl_checkpoint_last_success_timestamp_seconds"): 5000 - 10,
        key("scpl_restarts_total", reason="died"): 2,
        key("scpl_control_rejected_total", reason="garbage"): 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_counters_of_failures_exist_before_the_first_failure_and_count() -> None:
    run = Run()
    before = samples(run)
    assert before[key("scpl_checkpoint_failures_total")] == before[key("scpl_nonfinite_loss_total")] == 0
    assert before[key("scpl_stage_up", stage="2")] == 0
    run.start()
    run.event(NotWritten("checkpoint", "full"))
    assert samples(run)[key("scpl_checkpoint_failures_total")] == 1
    assert samples(run)[key("scpl_stage_up", stage="2")] == 0
