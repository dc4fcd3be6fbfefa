"""A run at one moment, as plain values that JSON can carry.

Everything that shows a run is drawn from it: the live table, ``scpl-dist top``, ``/status`` and the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scpl_dist.control.messages import VERSION, Stats
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run.layout import WorkerId

Status = dict[str, Any]


def snapshot(coordinator: Coordinator, now: float, restarts: Mapping[str, int] | None = None) -> Status:
    """The state of a run; `now` is monotonic seconds, `restarts` counts earlier starts by what ended them.

    Times and bytes of the workers are counted since the start of their processes. ``seconds`` is the time of this
    start since its first item, None before it; ``now`` serves to tell the time between two snapshots.
    """
    config, flow = coordinator.config, coordinator.flow
    begun = flow.begun if flow else None
    results = flow.results if flow else None
    ids = sorted(coordinator.layout.workers, key=lambda worker_id: (worker_id.stage, worker_id.replica))
    last = coordinator.members.get(config.pipeline.stages - 1)
    status: Status = {
        "state": coordinator.state,
        "generation": coordinator.generation,
        "version": VERSION,
        "method": config.run.method,
        "now": now,
        "seconds": None if begun is None else now - begun,
        "unready": coordinator.unready(now),
        "step": results.steps_done if results else 0,
        "steps": flow.sequence.steps if flow else None,
        "epoch": last.epoch if last else 0,
        "epochs": config.run.epochs,
        "accuracies": results.history() if results else [],
        "samples": results.samples if results else 0,
        "samples_per_second": results.samples_per_second if results else None,
        "seconds_left": _seconds_left(coordinator),
        "learning_rate": results.learning_rate if results else None,
        "checkpoints": coordinator.checkpoints,
        "checkpoint_failures": coordinator.checkpoint_failures,
        "last_checkpoint": None,
        "nonfinite_losses": coordinator.nonfinite_losses,
        "rejected": dict(coordinator.rejected),
        "restarts": dict(restarts or {}),
        "workers": [_worker(coordinator, worker_id, now) for worker_id in ids],
    }
    if coordinator.last_commit is not None and coordinator.committed_at is not None:
        age = now - coordinator.committed_at  # of the monotonic clock: right when the wall clock jumps
        status["last_checkpoint"] = {**asdict(coordinator.last_commit), "age": age}
    return status


def _worker(coordinator: Coordinator, worker_id: WorkerId, now: float) -> dict[str, Any]:
    """A worker that has not joined yet has the same keys, with None or nothing behind them."""
    member = coordinator.members.get(worker_id.rank)
    who = {"stage": worker_id.stage, "replica": worker_id.replica, "rank": worker_id.rank}
    if member is None:
        missing = dict.fromkeys(("host", "pid", "device", "phase", "step", "epoch", "micro_batch", "still"))
        counts: dict[str, Any] = {"losses": {}, "micro_batches": {}, "stragglings": 0}
        return who | {"name": worker_id.label, "up": False} | missing | counts | asdict(Stats())
    return who | {
        "name": worker_id.label,
        "up": coordinator.state != "over" and not member.left,
        "host": member.hello.host,
        "pid": member.hello.pid,
        "device": member.hello.device,
        "phase": member.phase,
        "step": member.step,
        "epoch": member.epoch,
        "micro_batch": member.micro_batch,
        "still": now - member.changed,  # seconds since it last did something else
        "losses": dict(member.losses),
        "micro_batches": dict(member.micro_batches),
        "stragglings": member.stragglings,
        **asdict(member.stats),
    }


def _seconds_left(coordinator: Coordinator) -> float | None:
    flow, data = coordinator.flow, coordinator.data
    speed = flow.results.samples_per_second if flow else None
    if flow is None or data is None or not speed:
        return None
    steps = flow.sequence.steps - flow.results.steps_done
    return steps * data.sizes["train"] / flow.sequence.steps_per_epoch / speed


def shares(busy: float, waiting: float, blocked: float) -> tuple[float, float, float] | None:
    """What parts of a worker's time these are, which sum to 1; None as long as no time has passed."""
    total = busy + waiting + blocked
    return (busy / total, waiting / total, blocked / total) if total > 0 else None
