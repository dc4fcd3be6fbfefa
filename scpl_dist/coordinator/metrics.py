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

NAMES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "scpl_run_info": ("gauge", "The run; always 1.", ("method", "version")),
    "scpl_stage_info": ("gauge", "Where a stage runs; always 1.", ("stage", "host", "device")),
    "scpl_stage_up": ("gauge", "Whether all workers of a stage have joined and still work.", ("stage",)),
    "scpl_stage_replicas": ("gauge", "Workers of a stage that have joined and still work.", ("stage",)),
    "scpl_stage_last_progress_timestamp_seconds": ("gauge", "When a stage last made progress.", ("stage",)),
    "scpl_step": ("gauge", "Step that a stage is at.", ("stage",)),
    "scpl_epoch": ("gauge", "Epoch that the last stage is at.", ()),
    "scpl_loss": ("gauge", "Latest loss of a block.", ("stage", "block")),
    "scpl_accuracy_ratio": ("gauge", "Accuracy of the latest evaluation.", ("split",)),
    "scpl_learning_rate": ("gauge", "Latest learning rate.", ()),
    "scpl_samples_total": ("counter", "Training samples that went through all stages.", ()),
    "scpl_microbatches_total": ("counter", "Micro-batches that a stage has handled.", ("stage", "kind")),
    "scpl_stage_phase_seconds_total": ("counter", "Time of a stage by phase.", ("stage", "phase")),
    "scpl_stage_busy_seconds_total": ("counter", "Time in which a stage worked.", ("stage",)),
    "scpl_stage_waiting_seconds_total": ("counter", "Time in which a stage waited for input.", ("stage",)),
    "scpl_stage_blocked_seconds_total": ("counter", "Time in which the next stage had no room.", ("stage",)),
    "scpl_queue_depth": ("gauge", "Messages that wait in front of a stage.", ("stage",)),
    "scpl_transport_sent_bytes_total": ("counter", "Tensor bytes sent to neighbours.", ("stage",)),
    "scpl_transport_received_bytes_total": ("counter", "Tensor bytes from neighbours.", ("stage",)),
    "scpl_memory_peak_bytes": ("gauge", "Highest memory use of a stage.", ("stage",)),
    "scpl_checkpoint_last_success_timestamp_seconds": ("gauge", "When a checkpoint was last published.", ()),
    "scpl_checkpoint_duration_seconds": ("gauge", "Time to write the last checkpoint.", ()),
    "scpl_checkpoint_size_bytes": ("gauge", "Size of the last checkpoint.", ()),
    "scpl_checkpoints_total": ("counter", "Checkpoints published.", ()),
    "scpl_checkpoint_failures_total": ("counter", "Checkpoints that could not be published.", ()),
    "scpl_restarts_total": ("counter", "Earlier starts of this run, by what ended them.", ("reason",)),
    "scpl_nonfinite_loss_total": ("counter", "Losses that were NaN or infinite.", ()),
    "scpl_stragglers_total": ("counter", "Times a stage became a straggler.", ("stage",)),
    "scpl_control_rejected_total": (
        "counter",
        "Frames, workers and connections that were turned away.",
        ("reason",),
    ),
    "scpl_samples_per_second": ("gauge", "Training samples per second in steady state.", ()),
}
"""Every metric: kind, help, labels. Dashboards and rules may use these and no others."""

KINDS = ("train", "evaluate")
PHASES = frozenset(Phase) - OUTSIDE - OCCASIONAL
Row = tuple[str, tuple[str, ...], float | None]


class RunCollector(Collector):
    """Makes metrics of a snapshot, which is taken anew for each scrape; `wall` is the time of day in seconds."""

    def __init__(self, status: Callable[[], Status], wall: Callable[[], float] = time.time) -> None:
        self._status = status
        self._wall = wall

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return [_family(name) for name in NAMES]

    def collect(self) -> Iterable[Metric]:
        """The families with the values of this moment."""
        families = {name: _family(name) for name in NAMES}
        status = self._status()
        rows = [*_run_rows(status, self._wall())]
        for stage in sorted({worker["stage"] for worker in status["workers"]}):
            workers = [worker for worker in status["workers"] if worker["stage"] == stage]
            rows += _stage_rows(str(stage), workers, self._wall())
        for name, labels, value in rows:
            if value is not None:
                families[name].add_metric(labels, float(value))
        return families.values()


def _run_rows(status: Status, wall: float) -> Iterator[Row]:
    yield "scpl_run_info", (status["method"], status["version"]), 1
    yield "scpl_epoch", (), status["epoch"]
    for reason, times in status["rejected"].items():
        yield "scpl_control_rejected_total", (reason,), times
    for reason, times in status["restarts"].items():
        yield "scpl_restarts_total", (reason,), times
    yield "scpl_nonfinite_loss_total", (), status["nonfinite_losses"]
    yield "scpl_checkpoints_total", (), status["checkpoints"]
    yield "scpl_checkpoint_failures_total", (), status["checkpoint_failures"]
    last = status["last_checkpoint"]
    if last is not None:
        yield "scpl_checkpoint_last_success_timestamp_seconds", (), wall - last["age"]
        yield "scpl_checkpoint_duration_seconds", (), last["seconds"]
        yield "scpl_checkpoint_size_bytes", (), last["bytes"]
    yield "scpl_samples_total", (), status["samples"]
    yield "scpl_learning_rate", (), status["learning_rate"]
    yield "scpl_samples_per_second", (), status["samples_per_second"]
    # Of each split the latest: a series must not vanish while the next epoch is half evaluated.
    latest = {split: value for row in status["accuracies"] for split, value in row.items()}
    latest.pop("epoch", None)
    for split, accuracy in latest.items():
        yield "scpl_accuracy_ratio", (split,), accuracy


def _stage_rows(stage: str, workers: list[dict[str, Any]], wall: float) -> Iterator[Row]:
    """A stage with several workers has the sum of their times and bytes, and is as far as its slowest one."""
    up = [worker["up"] for worker in workers]
    yield "scpl_stage_up", (stage,), all(up)
    yield "scpl_stage_replicas", (stage,), sum(up)
    there = [worker for worker in workers if worker["host"] is not None]
    if not there:
        return

    def values(key: str) -> list[Any]:
        return [worker[key] for worker in there]

    for host, device in sorted(set(zip(values("host"), values("device"), strict=True))):
        yield "scpl_stage_info", (stage, host, device), 1
    yield "scpl_stage_last_progress_timestamp_seconds", (stage,), wall - max(values("still"))
    yield "scpl_step", (stage,), min(values("step"))
    for time_of in ("busy", "waiting", "blocked"):
        yield f"scpl_stage_{time_of}_seconds_total", (stage,), sum(values(time_of))
    yield "scpl_queue_depth", (stage,), max(values("queue"))
    yield "scpl_transport_sent_bytes_total", (stage,), sum(values("bytes_sent"))
    yield "scpl_transport_received_bytes_total", (stage,), sum(values("bytes_received"))
    yield "scpl_memory_peak_bytes", (stage,), max(values("peak_memory"))
    yield "scpl_stragglers_total", (stage,), sum(values("stragglings"))
    for kind in KINDS:
        yield "scpl_microbatches_total", (stage, kind), there[0]["micro_batches"].get(kind, 0)
    for phase in sorted(set(PHASES).union(*values("phases"))):
        seconds = sum(phases.get(phase, 0.0) for phases in values("phases"))
        yield "scpl_stage_phase_seconds_total", (stage, phase), seconds
    for block, loss in there[0]["losses"].items():
        yield "scpl_loss", (stage, block), loss


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    kind, text, labels = NAMES[name]
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    return family(name, text, labels=labels)
