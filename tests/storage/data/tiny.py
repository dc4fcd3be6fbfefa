"""A model that is small enough to keep its checkpoints in the repository."""

from __future__ import annotations

from torch import nn


def blocks(classes: int) -> list[nn.Module]:
    """Three blocks for the digits, whose images are 16 x 16 here."""
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
    ]
