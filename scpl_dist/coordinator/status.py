"""A run at one moment, as plain values that JSON can carry.

Everything that shows a run is drawn from it: the live table, ``scpl-dist top``, ``/status`` and the metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scpl_dist.control.messages import VERSION, Stats
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.run.layout import WorkerId

Status = dict[str, Any]


def snapshot(coordinator: Coordinator, now: float, restarts: Mapping[str, int] | None = None) -> Status:
    """The state of a run; `now` is monotonic seconds, `restarts` counts earlier starts by what ended them.

    Those failures that this start has survived are added.

    Times and bytes of the workers are counted since the start of their processes. ``seconds`` is the time of this
    start since its first item, None before it; ``now`` serves to tell the time between two snapshots.
    """
    config = coordinator.config
    flow = coordinator.flow
    results = flow.results if flow else None
    last = coordinator.members.get(config.pipeline.stages - 1)
    workers = sorted(coordinator.layout.workers, key=lambda worker: (worker.stage, worker.replica))
    status: Status = {
        "state": coordinator.state,
        "generation": coordinator.origin.generation,
        "version": VERSION,
        "method": config.run.method,
        "now": now,
        "seconds": None if flow is None or flow.begun is None else flow.seconds(now),
        "unready": _unready(coordinator, now),
        "step": results.steps_done if results else 0,
        "steps": flow.sequence.steps if flow else None,
        "epoch": last.epoch if last else 0,
        "epochs": config.run.epochs,
        "accuracies": results.history() if results else [],
        "metrics": results.latest if results else {},
        "samples": results.samples if results else 0,
        "samples_per_second": results.samples_per_second if results else None,
        "seconds_left": _seconds_left(coordinator),
        "learning_rate": results.learning_rate if results else None,
        "checkpoints": coordinator.checkpoints,
        "checkpoint_failures": coordinator.checkpoint_failures,
        "last_checkpoint": None,
        "nonfinite_losses": coordinator.nonfinite_losses,
        "rejected": dict(coordinator.rejected),
        "group": coordinator.group,
        "restarts": dict(Counter(restarts or {}) + Counter(coordinator.restarts.causes)),
        "workers": [_worker(coordinator, worker, now) for worker in workers],
    }
    if coordinator.last_commit is not None:
        commit, since = coordinator.last_commit
        status["last_checkpoint"] = asdict(commit) | {"age": now - since}  # right when the clock jumps, too
    return status


def _worker(coordinator: Coordinator, worker: WorkerId, now: float) -> dict[str, Any]:
    """A worker that has not joined yet has the same keys, with None or nothing behind them."""
    member = coordinator.members.get(worker.rank)
    row = {"stage": worker.stage, "replica": worker.replica, "rank": worker.rank, "name": worker.label}
    hello = member.hello if member else None
    row |= {key: getattr(hello, key, None) for key in ("host", "pid", "device")}
    row |= {key: getattr(member, key, None) for key in ("phase", "step", "epoch", "micro_batch")}
    return row | {
        "up": member is not None and coordinator.state != "over" and not member.left,
        "still": now - member.changed if member else None,  # seconds since it last did something else
        "losses": dict(member.losses) if member else {},
        "micro_batches": dict(member.micro_batches) if member else {},
        "stragglings": member.stragglings if member else 0,
        **asdict(member.stats if member else Stats()),
    }


def _unready(coordinator: Coordinator, now: float) -> str | None:
    members = coordinator.members.values()
    if coordinator.state != "running":
        joined = f"{len(members)} of {coordinator.layout.world} workers have joined"
        return f"{joined}; the run is {coordinator.state}"
    still = now - max(member.changed for member in members)
    late = still > coordinator.config.runtime.timeout_s
    return f"no stage has made progress for {still:.0f} s" if late else None


def _seconds_left(coordinator: Coordinator) -> float | None:
    flow = coordinator.flow
    speed = flow.results.samples_per_second if flow else None
    if flow is None or coordinator.data is None or not speed:
        return None
    epochs = (flow.sequence.steps - flow.results.steps_done) / flow.sequence.steps_per_epoch
    return epochs * coordinator.data.sizes["train"] / speed


def shares(busy: float, waiting: float, blocked: float) -> tuple[float, float, float] | None:
    """What parts of a worker's time these are, which sum to 1; None as long as no time has passed."""
    total = busy + waiting + blocked
    return (busy / total, waiting / total, blocked / total) if total > 0 else None
