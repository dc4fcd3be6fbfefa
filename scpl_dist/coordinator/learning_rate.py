"""The learning rate of each step: a warm-up, and then a schedule that ends with the run.

In the warm-up each step has a little more, and the step after it has ``optimizer.lr``. The schedule begins there. With
``schedule.per = "epoch"`` it is looked at where an epoch begins only.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from scpl_dist.run.config import Config
from scpl_dist.run.imports import blaming
from scpl_dist.run.registry import Registry

BUILT_IN = ("cosine", "constant", "linear", "step", "wsd")
SCHEDULES = Registry("schedules", "schedule.name", dict.fromkeys(BUILT_IN, ""))


class LearningRate:
    """Of a step, counted from 0; ValueError if the schedule is not known or does not fit the length of the run."""

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self._schedule = schedule = config.schedule
        self._lr, self._end_lr = config.optimizer.lr, config.optimizer.end_lr
        self._steps = config.run.epochs * steps_per_epoch
        self._unit = (
            steps_per_epoch if schedule.per == "epoch" else 1
        )  # steps in which the schedule stands still
        share = schedule.warmup
        self._warmup = share if isinstance(share, int) else round(share * self._steps)
        if self._warmup >= self._steps:
            raise ValueError(
                f"schedule.warmup = {share}: the run has {self._steps} steps, and the warm-up must end before it; "
                "use fewer steps, or a share of the run such as 0.05"
            )
        if schedule.name == "wsd" and self._warmup + schedule.decay * self._steps > self._steps:
            raise ValueError(
                f"schedule.warmup = {share} and schedule.decay = {schedule.decay}: together they are longer than the "
                f"run of {self._steps} steps; lower one of them"
            )
        self._own: Callable[[int, int], float] | None = None
        if schedule.name not in BUILT_IN:
            self._own = SCHEDULES.find(schedule.name)
            for step in (*range(0, self._steps, max(1, self._steps // 1000)), self._steps - 1):
                rate = self(step)
                if not isinstance(rate, float) or not 0 <= rate < math.inf:
                    raise ValueError(
                        f"schedule.name = {schedule.name!r}: the learning rate of step {step} would be {rate}; give a "
                        "factor that is not negative"
                    )

    def __call__(self, step: int) -> float:
        if step < self._warmup:
            return self._lr * (step + 1) / (self._warmup + 1)
        begin = step - step % self._unit
        done, steps = max(0, begin - self._warmup), self._steps - self._warmup
        falling = self._lr - self._end_lr
        match self._schedule.name:
            case "cosine":
                return self._end_lr + falling * 0.5 * (1 + math.cos(math.pi * done / steps))
            case "linear":
                return self._end_lr + falling * (1 - done / steps)
            case "wsd":
                return self._end_lr + falling * min(1, (steps - done) / (self._schedule.decay * self._steps))
            case "step":  # its milestones are counted from the beginning of the run
                return self._lr * self._schedule.gamma ** bisect_right(
                    self._schedule.milestones, step // self._unit
                )
            case "constant":
                return self._lr
        assert self._own is not None
        with blaming("schedule.name", self._schedule.name):
            return self._lr * self._own(done, steps)
