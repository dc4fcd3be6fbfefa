"""A run at one moment, as plain values that JSON can carry.

Everything that shows a run is drawn from it: the live table, ``scpl-dist top``, ``/status`` and the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    config, agenda, tally = coordinator.config, coordinator.agenda, coordinator.tally
    ids = sorted(coordinator.layout.workers, key=lambda worker_id: (worker_id.stage, worker_id.replica))
    last = coordinator.members.get(config.pipeline.stages - 1)
    status: Status = {
        "state": coordinator.state,
        "generation": coordinator.generation,
        "version": VERSION,
        "method": config.run.method,
        "now": now,
        "seconds": None if coordinator.started is None else now - coordinator.started,
        "unready": coordinator.unready(now),
        "step": tally.steps_done if tally else 0,
        "steps": agenda.steps if agenda else None,
        "epoch": last.epoch if last else 0,
        "epochs": config.run.epochs,
        "accuracies": tally.history() if tally else [],
        "samples": tally.samples if tally else 0,
        "samples_per_second": tally.samples_per_second if tally else None,
        "seconds_left": _seconds_left(coordinator),
        "learning_rate": tally.learning_rate if tally else None,
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
        status["last_checkpoint"] = coordinator.last_commit.row() | {"age": age}
    return status


def _worker(coordinator: Coordinator, worker_id: WorkerId, now: float) -> dict[str, Any]:
    """A worker that has not joined yet has the same keys, with None or nothing behind them."""
    member = coordinator.members.get(worker_id.rank)
    who = {"stage": worker_id.stage, "replica": worker_id.replica, "rank": worker_id.rank}
    if member is None:
        missing = dict.fromkeys(("host", "pid", "device", "phase", "step", "epoch", "micro_batch", "still"))
        counts: dict[str, Any] = {"losses": {}, "micro_batches": {}, "stragglings": 0}
        return who | {"name": worker_id.label, "up": False} | missing | counts | Stats().model_dump()
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
        **member.stats.model_dump(),
    }


def _seconds_left(coordinator: Coordinator) -> float | None:
    agenda, tally, data = coordinator.agenda, coordinator.tally, coordinator.data
    if agenda is None or tally is None or data is None or not tally.samples_per_second:
        return None
    samples = (agenda.steps - tally.steps_done) * data.sizes["train"] / agenda.steps_per_epoch
    return samples / tally.samples_per_second


def shares(busy: float, waiting: float, blocked: float) -> tuple[float, float, float] | None:
    """What parts of a worker's time these are, which sum to 1; None as long as no time has passed."""
    total = busy + waiting + blocked
    return (busy / total, waiting / total, blocked / total) if total > 0 else None
