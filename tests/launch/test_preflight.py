"""What the check of a run finds that neither the configuration nor the data set says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scpl_dist import data
from scpl_dist.data import DataSource
from scpl_dist.data.source import Split
from scpl_dist.launch.preflight import examine
from scpl_dist.run import config


class SequenceLabels(DataSource):
    """The digits, with labels as a data set of an installed package may give them."""

    def __init__(self) -> None:
        self._digits = data.resolve(config.load())
        self.classes, self.sizes = self._digits.classes, self._digits.sizes

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        inputs, labels = self._digits.batch(split, epoch, indices)
        return inputs, labels[:, None].expand(-1, 5)


def test_labels_that_no_head_can_learn_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"data.name = 'digits': the label of a sample has shape \(5,\)"):
        examine(config.load(values={"metrics.port": 0}), SequenceLabels())
