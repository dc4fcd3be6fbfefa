"""Blocks that take a given time in training, and learn the same whatever it is: `settings` names them for a run.

A process whose number stands in the file "slow" of the folder takes four times as long, and nobody takes any while the
file "fast" is there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor, nn


def settings(folder: Path, pace_s: float) -> list[str]:
    """Four equal blocks, for images of digits."""
    return [f"model.name={__file__}:blocks", f"model.args.folder={folder}", f"model.args.pace_s={pace_s}"]


class Paced(nn.Sequential):
    """A block of its layers."""

    def __init__(self, folder: str, pace_s: float, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._slow, self._fast = Path(folder, "slow"), Path(folder, "fast")
        self._pace_s = pace_s

    def forward(self, inputs: Tensor) -> Tensor:
        """Wait, and then what the layers give."""
        if self.training and not self._fast.exists():
            held_back = self._slow.exists() and self._slow.read_text() == str(os.getpid())
            time.sleep(self._pace_s * (4 if held_back else 1))
        outputs: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        return outputs


def blocks(classes: int, folder: str, pace_s: float) -> list[nn.Module]:
    """The model."""
    first = Paced(folder, pace_s, nn.Flatten(), nn.Linear(256, 16), nn.ReLU())
    return [first, *[Paced(folder, pace_s, nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]]
