"""What `scpl_dist.train` returns: the result of a run, and on the way to it a row for each step and each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scpl_dist.storage.metrics_log import begin_of
from scpl_dist.storage.run_folder import RunFolder

Row = dict[str, float | int | None]
_OF_THE_EVENT = {"event", "epoch", "split", "time"}


@dataclass(frozen=True)
class History:
    """A run's ``metrics.jsonl`` as rows for a table, such as ``pandas.DataFrame(history.epochs)``."""

    steps: list[Row]
    """Of each step: "step", "epoch", "seconds" since the start, "lr", and "loss_0", "loss_1" ... of the blocks that
    learnt."""
    epochs: list[Row]
    """Of each evaluated epoch: "epoch", "seconds", and "test_accuracy", "test_loss" and whatever else was measured, by
    part of the data. Epochs count from 0."""

    @classmethod
    def read(cls, run_dir: Path) -> History:
        """That of a run, also of one that goes on: of the steps until now."""
        rows = RunFolder(run_dir).metrics.rows()
        begin = begin_of(rows)
        steps: dict[int, Row] = {}
        epochs: dict[int, Row] = {}
        for row in rows:
            seconds = row["time"] - begin if begin is not None and "time" in row else None
            if row["event"] == "train":
                named = {"step": row["step"], "epoch": row["epoch"], "seconds": seconds, "lr": row["lr"]}
                step = steps.setdefault(row["step"], {}) | named
                steps[row["step"]] = step | {f"loss_{row['block']}": row["loss"]}
            elif row["event"] == "eval":
                numbers = {
                    f"{row['split']}_{name}": value
                    for name, value in row.items()
                    if name not in _OF_THE_EVENT and isinstance(value, int | float)
                }
                epoch = epochs.setdefault(row["epoch"], {})
                epochs[row["epoch"]] = epoch | {"epoch": row["epoch"], "seconds": seconds} | numbers
        return cls([steps[step] for step in sorted(steps)], [epochs[epoch] for epoch in sorted(epochs)])


class RunResult(dict[str, Any]):
    """The content of ``result.json`` by key, and the run folder as "run_dir"."""

    @property
    def run_dir(self) -> Path:
        """The run folder, which `scpl_dist.load`, `evaluate` and `export` take."""
        return Path(self["run_dir"])

    @cached_property
    def history(self) -> History:
        """Losses of each step and evaluations of each epoch, read from the run folder when first asked for."""
        return History.read(self.run_dir)
