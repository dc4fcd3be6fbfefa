"""A stack of wide layers, whose weights are most of what it needs: `settings` names it for a run."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def settings(depth: int, width: int, room: int = 0) -> list[str]:
    """For images of digits; with `room`, a worker may take so many bytes more, from its first block on."""
    args = {"depth": depth, "width": width, "room": room}
    return [f"model.name={__file__}:blocks", *(f"model.args.{key}={value}" for key, value in args.items())]


def blocks(classes: int, depth: int, width: int, room: int = 0) -> list[Callable[[], nn.Module]]:
    """The model, block by block."""
    return [functools.partial(_block, index, width, room) for index in range(depth)]


def _block(index: int, width: int, room: int) -> nn.Module:
    if room and index == 0 and not torch.empty(()).is_meta:
        limit(room)
    entering = 256 if index == 0 else width
    return nn.Sequential(
        nn.Flatten(), nn.Linear(entering, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1)
    )


def limit(room: int) -> None:
    """Let this process have so many bytes of memory of its own beyond what it has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, ((kib << 10) + room,) * 2)
