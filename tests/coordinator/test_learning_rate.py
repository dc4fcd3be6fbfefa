"""The learning rate against torch's schedulers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from scpl_dist.coordinator.learning_rate import LearningRate
from scpl_dist.run.config import load

EPOCHS, STEPS_PER_EPOCH, LR, END = 6, 5, 0.4, 0.04
STEPS = EPOCHS * STEPS_PER_EPOCH
WARMUP = 7


def rates(**schedule: object) -> list[float]:
    values = {f"schedule.{key}": value for key, value in schedule.items()}
    falls = schedule.get("name", "cosine") in ("cosine", "linear", "wsd")
    end = {"optimizer.end_lr": END} if falls else {}
    config = load(values={"run.epochs": EPOCHS, "optimizer.lr": LR, **end, **values})
    rate = LearningRate(config, STEPS_PER_EPOCH)
    return [rate(step) for step in range(STEPS)]


def torchs(*parts: tuple[int, type[LRScheduler], dict[str, object]]) -> list[float]:
    """Rates of schedulers that follow each other, each from a step on."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = [kind(optimizer, **settings) for _, kind, settings in parts]  # type: ignore[arg-type]
    scheduler = SequentialLR(optimizer, schedulers, [begin for begin, *_ in parts[1:]])
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


RISING = (0, LinearLR, {"start_factor": 1 / (WARMUP + 1), "total_iters": WARMUP})
ENDING = {"end_factor": END / LR}


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"name": "cosine"}, [(0, CosineAnnealingLR, {"T_max": STEPS, "eta_min": END})]),
        (
            {"name": "cosine", "warmup": WARMUP},
            [RISING, (WARMUP, CosineAnnealingLR, {"T_max": STEPS - WARMUP, "eta_min": END})],
        ),
        (
            {"name": "linear", "warmup": 7 / 30},
            [
                RISING,
                (WARMUP, LinearLR, {"start_factor": 1.0, **ENDING, "total_iters": STEPS - WARMUP}),
            ],
        ),
        ({"name": "constant", "warmup": WARMUP}, [RISING, (WARMUP, ConstantLR, {"factor": 1.0})]),
        ({"name": "step", "milestones": [11, 23]}, [(0, MultiStepLR, {"milestones": [11, 23]})]),
        (
            {"name": "wsd", "warmup": WARMUP, "decay": 0.2},
            [
                RISING,
                (WARMUP, ConstantLR, {"factor": 1.0}),
                (24, LinearLR, {"start_factor": 1.0, **ENDING, "total_iters": 6}),
            ],
        ),
    ],
    ids=["cosine", "warm-up and cosine", "warm-up and linear", "constant", "step", "wsd"],
)
def test_rates_of_each_step_are_those_of_torch(
    schedule: dict[str, object], wanted: list[tuple[int, type[LRScheduler], dict[str, object]]]
) -> None:
    assert rates(per="step", **schedule) == pytest.approx(torchs(*wanted), rel=1e-12)


def test_by_epochs_a_schedule_is_a_staircase_on_its_curve() -> None:
    for name in ("cosine", "linear", "wsd"):
        curve = rates(name=name, per="step")
        assert rates(name=name) == [curve[step - step % STEPS_PER_EPOCH] for step in range(STEPS)]
    falling = rates(name="step", milestones=[2, 5], gamma=0.5)
    assert falling == [LR] * 10 + [LR / 2] * 15 + [LR / 4] * 5
    warm = rates(warmup=WARMUP)  # steady from the warm-up's end to the epoch's
    assert warm[:WARMUP] == pytest.approx([LR * step / (WARMUP + 1) for step in range(1, WARMUP + 1)])
    assert warm[WARMUP:10] == [LR] * 3
    assert warm[10] == pytest.approx(END + (LR - END) * 0.5 * (1 + math.cos(math.pi * 3 / 23)))


def test_a_schedule_of_ones_own_gives_factors(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def root(done, steps):\n    return (1 - done / steps) ** 0.5\n"
        "def wrong(done, steps):\n    return -1\n"
        "def broken(done):\n    return 1\n"
    )
    found = rates(name=f"{tmp_path}/mine.py:root", per="step", warmup=WARMUP)
    assert found[WARMUP + 3] == pytest.approx(LR * (20 / 23) ** 0.5)
    for name, message in (
        ("wrong", "step 0 would be -0.4; give a factor"),
        ("broken", r"schedule.name = .*mine.py:broken.*TypeError"),
        ("none", "has no 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            rates(name=f"{tmp_path}/mine.py:{name}")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"name": "cosin"},
            "schedule.name = 'cosin': unknown; use one of cosine, constant, linear, step, wsd",
        ),
        ({"warmup": 30}, "schedule.warmup = 30: the run has 30 steps"),
        ({"warmup": -1}, "schedule.warmup = -1: input should be greater than or equal to 0"),
        ({"warmup": 1.5}, r"schedule.warmup = 1.5: input should be less than 1"),
        ({"name": "wsd", "warmup": 10, "decay": 0.7}, r"warmup = 10 and schedule.decay = 0.7: together"),
        ({"name": "step"}, "schedule.milestones, which is empty"),
        ({"name": "step", "milestones": [3, 2]}, "give each once, in order"),
        ({"gamma": 0.5}, "schedule.gamma = 0.5: only schedule.name = 'step' reads it, this is 'cosine'"),
        ({"name": "step", "milestones": [1], "decay": 0.5}, "schedule.decay = 0.5: only .* 'wsd' reads it"),
    ],
)
def test_what_does_not_fit_is_refused(schedule: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(**schedule)


def test_a_schedule_that_does_not_fall_to_end_lr_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"optimizer.end_lr = 0.1: schedule.name = 'constant' does not end"):
        load(values={"schedule.name": "constant", "optimizer.end_lr": 0.1})
    low = load(values={"schedule.name": "constant", "optimizer.lr": 1e-6})  # below the default of end_lr
    assert LearningRate(low, 5)(3) == 1e-6
