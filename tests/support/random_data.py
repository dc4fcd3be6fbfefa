"""A data set and a model that draw at random, from every generator that there is; and what reads of it were made."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Noisy:
    """Samples of 4 numbers: which it is, and a draw of torch, numpy and ``random``."""

    def __init__(self, size: int, reads: Path | None) -> None:
        self.size = size
        self.reads = reads

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.reads is not None:
            with self.reads.open("a") as file:
                file.write(".")
        numbers = [index / self.size, float(torch.rand(())), np.random.rand(), random.random()]
        return torch.tensor(numbers), index % 3


def noisy(root: str, record: bool = False) -> tuple[Noisy, Noisy]:
    """A training and a test part; with `record` each read is a byte in a file ``train`` or ``test`` in `root`."""
    return tuple(  # type: ignore[return-value]
        Noisy(size, Path(root, part) if record else None) for part, size in (("train", 60), ("test", 20))
    )


class Moody(nn.Module):
    """A linear layer with dropout, which numpy and ``random`` have a say in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + random.random() + float(np.random.rand())
        answer: torch.Tensor = self.dropout(self.layer(x))
        return answer


def moody(classes: int) -> list[nn.Module]:
    return [Moody() for _ in range(3)]
