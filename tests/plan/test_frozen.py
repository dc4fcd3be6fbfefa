"""What of the tables [[block]] only the model can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load


def plan(*tables: dict[str, Any], **values: Any) -> Plan:
    values = {key.replace("__", "."): value for key, value in values.items()}
    return Plan.plan(load(values=values | {"block": list(tables)}), 10, torch.zeros(2, 1, 16, 16))


def test_a_block_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"block.index = \[0, 4\]: the model 'vgg_tiny' has 4 blocks, 0 to 3"
    ):
        plan({"index": [0, 4], "freeze": True})


def test_a_run_in_which_nothing_would_learn_is_refused() -> None:
    with pytest.raises(
        ValueError, match="all 4 blocks of the model are frozen, and nothing would learn: leave one"
    ):
        plan({"index": [0, 1, 2, 3], "freeze": True})
    some = {"index": [0, 3], "freeze": True}, {"index": [1, 2], "freeze_after_epoch": 5}
    with pytest.raises(ValueError, match=r"frozen after 5 epochs, .* or end the run with run.epochs = 5"):
        plan(*some, run__epochs=6)
    plan(*some, run__epochs=5).check()


def test_what_is_never_frozen_is_said() -> None:
    late = {"index": 1, "freeze_after_epoch": 5}
    assert not [text for text in plan(late, run__epochs=6).doubts() if "block." in text]
    assert (
        "block.freeze_after_epoch = 5, of block.index = 1: the run has 5 epochs, so it is never frozen"
        in (plan(late, run__epochs=5).doubts())
    )


def test_a_method_of_every_kind_can_be_scheduled_in_all_its_epochs() -> None:
    tables = {"index": 0, "freeze": True}, {"index": [1, 3], "freeze_after_epoch": 2}
    for method in ("scpl", "early_exit", "al", "bp", "gpipe"):
        plan(*tables, run__method=method, pipeline__stages=3).check()
