"""Schedules drawn: the pictures of docs/methods.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from scpl_dist.methods.schedule import COST, Action, simulate


def picture(programs: Sequence[Iterable[Action]], capacity: int) -> str:
    """Forward and backward passes of all stages over time, a row a stage, a column a time unit.

    ``F2`` is the forward of micro-batch 2 (a running number over all items), ``R2`` its recomputation, ``B2`` its
    backward; dots are idle.
    """
    rows = []
    for timeline in simulate(programs, capacity):
        micro_batches = 1 + max(action.micro_batch for *_, action in timeline)
        items = Counter[Action]()  # an item that repeats the program continues the count of micro-batches
        cells: dict[int, str] = {}
        for start, end, action in timeline:
            if action.kind in COST:
                number = items[action] * micro_batches + action.micro_batch
                items[action] += 1
                cells |= dict.fromkeys(range(start, end), f"{action.kind}{number}")
        rows.append(cells)
    length = 1 + max(slot for cells in rows for slot in cells)
    width = max(len(cell) for cells in rows for cell in cells.values())
    return "\n".join(
        f"stage {k} " + " ".join(cells.get(slot, ".").ljust(width) for slot in range(length)).rstrip(" ")
        for k, cells in enumerate(rows)
    )
