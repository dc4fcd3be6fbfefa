"""One set of Prometheus metrics for the whole run, from the coordinator, which outlives every stage.

Values are read from a snapshot of the run at the moment of a scrape, so training pays nothing for them, and a stage
that dies takes no metric with it. Labels are few: stage, phase, method, and names that are fixed in advance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scpl_dist.coordinator.status import Status
from scpl_dist.run.phases import OCCASIONAL, OUTSIDE, Phase

Row = tuple[str, tuple[str, ...], float | None]
Source = str | tuple[Callable[[list[Any]], Any], str] | None

STAGE = ("stage",)
REASON = ("reason",)
# Help, labels and source of every metric; dashboards and rules may use these and no others. The source is a key of
# the snapshot, or a key of its workers and how a stage's are put together.
NAMES: dict[str, tuple[str, tuple[str, ...], Source]] = {
    "scpl_run_info": ("The run; always 1.", ("method", "version"), None),
    "scpl_stage_info": ("Where a stage runs; always 1.", ("stage", "host", "device"), None),
    "scpl_stage_up": ("Whether all workers of a stage have joined and still work.", STAGE, None),
    "scpl_stage_replicas": ("Workers of a stage that have joined and still work.", STAGE, None),
    "scpl_stage_last_progress_timestamp_seconds": ("When a stage last made progress.", STAGE, None),
    "scpl_step": ("Step that a stage is at.", STAGE, (min, "step")),
    "scpl_epoch": ("Epoch that the last stage is at.", (), "epoch"),
    "scpl_loss": ("Latest loss of a block.", ("stage", "block"), None),
    "scpl_accuracy_ratio": ("Accuracy of the latest evaluation.", ("split",), None),
    "scpl_eval_loss": ("Loss of the latest evaluation.", ("split",), None),
    "scpl_learning_rate": ("Latest learning rate.", (), "learning_rate"),
    "scpl_samples_total": ("Training samples that went through all stages.", (), "samples"),
    "scpl_microbatches_total": ("Micro-batches that a stage has handled.", ("stage", "kind"), None),
    "scpl_stage_phase_seconds_total": ("Time of a stage by phase.", ("stage", "phase"), None),
    "scpl_stage_busy_seconds_total": ("Time in which a stage worked.", STAGE, (sum, "busy")),
    "scpl_stage_waiting_seconds_total": ("Time in which a stage waited for input.", STAGE, (sum, "waiting")),
    "scpl_stage_blocked_seconds_total": (
        "Time in which the next stage had no room.",
        STAGE,
        (sum, "blocked"),
    ),
    "scpl_block_seconds_total": ("Time in which a stage trained a block.", ("stage", "block"), None),
    "scpl_queue_depth": ("Messages that wait in front of a stage.", STAGE, (max, "queue")),
    "scpl_transport_sent_bytes_total": ("Tensor bytes sent to neighbours.", STAGE, (sum, "bytes_sent")),
    "scpl_transport_received_bytes_total": ("Tensor bytes from neighbours.", STAGE, (sum, "bytes_received")),
    "scpl_memory_peak_bytes": ("Highest memory use of a stage.", STAGE, (max, "peak_memory")),
    "scpl_checkpoint_last_success_timestamp_seconds": ("When a checkpoint was last published.", (), None),
    "scpl_checkpoint_duration_seconds": ("Time to write the last checkpoint.", (), None),
    "scpl_checkpoint_size_bytes": ("Size of the last checkpoint.", (), None),
    "scpl_checkpoints_total": ("Checkpoints published.", (), "checkpoints"),
    "scpl_checkpoint_failures_total": ("Checkpoints that could not be published.", (), "checkpoint_failures"),
    "scpl_restarts_total": ("Failures that the run has survived, by their cause.", REASON, None),
    "scpl_nonfinite_loss_total": ("Losses that were NaN or infinite.", (), "nonfinite_losses"),
    "scpl_stragglers_total": ("Times a stage became a straggler.", STAGE, (sum, "stragglings")),
    "scpl_control_rejected_total": ("Frames, workers and connections that were turned away.", REASON, None),
    "scpl_samples_per_second": ("Training samples per second in steady state.", (), "samples_per_second"),
}


class RunCollector(Collector):
    """Makes metrics of a snapshot, which is taken anew for each scrape; `wall` is the time of day in seconds."""

    def __init__(self, status: Callable[[], Status], wall: Callable[[], float] = time.time) -> None:
        self._status = status
        self._wall = wall

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, (text, labels, _) in NAMES.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            families[name] = family(name, text, labels=labels)
        status = self._status()
        rows = [*_run_rows(status, self._wall())]
        for stage in sorted({worker["stage"] for worker in status["workers"]}):
            workers = [worker for worker in status["workers"] if worker["stage"] == stage]
            rows += _stage_rows(str(stage), workers, self._wall())
        for name, values, value in rows:
            if value is not None:
                families[name].add_metric(values, float(value))
        return families.values()


def _run_rows(status: Status, wall: float) -> Iterator[Row]:
    for name, (_, _, source) in NAMES.items():
        if isinstance(source, str):
            yield name, (), status[source]
    yield "scpl_run_info", (status["method"], status["version"]), 1
    for reason, times in status["rejected"].items():
        yield "scpl_control_rejected_total", (reason,), times
    for reason, times in status["restarts"].items():
        yield "scpl_restarts_total", (reason,), times
    last = status["last_checkpoint"]
    if last is not None:
        yield "scpl_checkpoint_last_success_timestamp_seconds", (), wall - last["age"]
        yield "scpl_checkpoint_duration_seconds", (), last["seconds"]
        yield "scpl_checkpoint_size_bytes", (), last["bytes"]
    # Of each split the latest: a series must not vanish while the next epoch is half evaluated.
    latest = {split: value for row in status["accuracies"] for split, value in row.items()}
    latest.pop("epoch", None)
    for split, accuracy in latest.items():
        yield "scpl_accuracy_ratio", (split,), accuracy
    for split, found in status["metrics"].items():
        yield "scpl_eval_loss", (split,), found.get("loss")


def _stage_rows(stage: str, workers: list[dict[str, Any]], wall: float) -> Iterator[Row]:
    """A stage with several workers has the sum of their times and bytes, and is as far as its slowest one."""
    up = [worker["up"] for worker in workers]
    yield "scpl_stage_up", (stage,), all(up)
    yield "scpl_stage_replicas", (stage,), sum(up)
    there = [worker for worker in workers if worker["host"] is not None]
    if not there:
        return
    for name, (_, _, source) in NAMES.items():
        if isinstance(source, tuple):
            collected, key = source
            yield name, (stage,), collected([worker[key] for worker in there])
    for host, device in sorted({(worker["host"], worker["device"]) for worker in there}):
        yield "scpl_stage_info", (stage, host, device), 1
    still = max(worker["still"] for worker in there)
    yield "scpl_stage_last_progress_timestamp_seconds", (stage,), wall - still
    for kind in ("train", "evaluate"):
        yield "scpl_microbatches_total", (stage, kind), there[0]["micro_batches"].get(kind, 0)
    seconds = [worker["phases"] for worker in there]
    for phase in sorted((set(Phase) - OUTSIDE - OCCASIONAL).union(*seconds)):
        total = sum(phases.get(phase, 0.0) for phases in seconds)
        yield "scpl_stage_phase_seconds_total", (stage, phase), total
    for block, taken in there[0]["blocks"].items():
        yield "scpl_block_seconds_total", (stage, block), taken
    for block, loss in there[0]["losses"].items():
        yield "scpl_loss", (stage, block), loss
