"""Losses on their way from the device to the host, which reads them some items later.

    training thread    F LOSS B STEP | F LOSS B STEP | F LOSS B STEP | ...     waits for nothing that it started
    device               |                                |
                         |--> spoilt: no update is made from here on
                         '--> memory of the host -------> read: reported, or the end of the run

So an item is reported as done once all its losses are known to be finite, in the order of the items. A CPU has computed
a loss when the call returns: there it is read at once, before the update.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scpl_dist.control.messages import Done
from scpl_dist.run.errors import NonFinite

DELAY = 2  # items that a device may be behind the training thread


@dataclass(frozen=True, slots=True)
class _Noted:
    """Terms of a block's loss for one micro-batch; or, without a weight, of the gradient that came back to it."""

    step: int
    micro_batch: int
    block: int
    names: tuple[str, ...]
    values: Tensor  # (names,), on the host, perhaps still to be written
    weight: float | None

    def read(self) -> list[float]:
        """The values; raises NonFinite."""
        values: list[float] = self.values.tolist()
        for name, value in zip(self.names, values, strict=True):
            if not math.isfinite(value):
                what = f"{name} that came back to" if self.weight is None else f"loss {name!r} of"
                raise NonFinite(
                    f"{what} block {self.block} is {value}: lower optimizer.lr or check the data; "
                    "the update was not made",
                    self.step,
                    self.micro_batch,
                )
        return values


class Losses:
    """Those of one stage; with a `delay` of 0 items they are read at once."""

    def __init__(self, device: torch.device, delay: int) -> None:
        self._device = device
        self._delay = delay
        # Whether a loss was not finite, as 1 or 0, float32, a scalar on the device, which guards the updates there.
        # None: none can have been, as all are read before an update.
        self.spoilt: Tensor | None = torch.zeros((), device=device) if delay else None
        self._noted: list[_Noted] = []  # of the present item
        self._pending: deque[tuple[Done, list[_Noted], Any, Sequence[Any]]] = deque()

    def note(
        self,
        step: int,
        micro_batch: int,
        block: int,
        terms: tuple[str, ...],
        values: Tensor,
        weight: float | None,
    ) -> None:
        """Remember the terms of a loss, (terms,), before the update; raises NonFinite if they are read at once."""
        values = values.detach()
        if self.spoilt is not None:
            torch.maximum(self.spoilt, values.isfinite().logical_not().any().float(), out=self.spoilt)
        noted = _Noted(step, micro_batch, block, terms, to_host(values), weight)
        self._noted.append(noted)
        if self.spoilt is None:
            noted.read()

    def mark(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients that go back to the stage before, which are NaN if its update must not be made either."""
        if self.spoilt is None:
            return gradients
        bad = self.spoilt.bool()
        return [gradient.masked_fill(bad, torch.nan) for gradient in gradients]

    def note_mark(self, step: int, micro_batch: int, block: int, gradients: list[Tensor]) -> None:
        """Find out whether gradients that have come back are marked."""
        if self.spoilt is not None and gradients:
            self.note(step, micro_batch, block, ("the gradient",), gradients[0].flatten()[:1], None)

    def put(self, done: Done, lent: Sequence[Any] = ()) -> None:
        """The present item is done, but for its losses; what the device was `lent` is held until it has read it."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.current_stream(self._device).record_event()
        self._pending.append((done, self._noted, event, lent))
        self._noted = []

    def read(self, at_once: bool = False) -> Iterator[Done]:
        """The items whose losses should be there, or all of them `at_once`; raises NonFinite."""
        while len(self._pending) > (0 if at_once else self._delay):
            done, noted, event, lent = self._pending.popleft()
            if event is not None:
                event.synchronize()
            del lent
            yield replace(done, losses=_sums(noted))


def to_host(values: Tensor) -> Tensor:
    """A copy that a GPU writes, into pinned memory, when it comes to it."""
    return values.to("cpu", non_blocking=True)


def _sums(noted: list[_Noted]) -> dict[str, dict[str, float]]:
    """By block and term: weighted sums over the micro-batches."""
    sums: dict[str, dict[str, float]] = {}
    for one in noted:
        values = one.read()
        if one.weight is not None:
            of_block = sums.setdefault(str(one.block), {})
            for name, value in zip(one.names, values, strict=True):
                of_block[name] = of_block.get(name, 0.0) + one.weight * value
    return sums
