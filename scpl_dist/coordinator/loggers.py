"""Where the numbers of a run go besides its folder: TensorBoard, MLflow, Weights & Biases, or what a user writes.

A logger is a class that is made without arguments. Its methods are called one after the other, in a thread of its own:

    started(config, run_dir, step)   once: {"section.key": value}, the run's folder (`pathlib.Path`), and the first step
                                     that follows. A run that goes on trains from there again, to the same bits: what
                                     was logged of that step and later ones does not count.
    metrics(step, values)            {name: number} of a step, in parts as they come: stages are at different steps
    finished(code, result)           once: the exit code of the run, and for 0 the numbers of ``result.json``

The training never waits for it: steps that come while it is too far behind are left out, one that raises is left out
from then on, and one that hangs holds the end of a run for some seconds only.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.run.config import Config, Effect
from scpl_dist.run.imports import blaming
from scpl_dist.run.registry import Registry

STEPS_WAITING = 10_000  # that a slow logger may be behind
END_S = 8.0  # for the last words; the launcher waits for 10 s
FAILED_END_S = 3.0  # when the run may be started again
_EVENTS = ("started", "metrics", "finished")
_HERE = "scpl_dist.coordinator"
LOGGERS = Registry(
    "loggers",
    "log.to",
    {
        "tensorboard": f"{_HERE}.tensorboard_logger:TensorBoard",
        "mlflow": f"{_HERE}.mlflow_logger:MLflow",
        "wandb": f"{_HERE}.wandb_logger:WeightsAndBiases",
    },
)


def check(config: Config) -> None:
    """ValueError if a logger that the configuration names does not exist, is not installed, or is none."""
    for name in config.log.to:
        if name in LOGGERS.builtin:  # not imported: that takes seconds
            spec = importlib.util.find_spec(name)
            # A folder of that name, such as W&B leaves, is no package.
            if spec is None or spec.origin is None:
                raise ValueError(
                    f"log.to = {name!r}: the package {name} is not installed: pip install 'scpl_dist[{name}]'"
                )
            continue
        found = LOGGERS.find(name)
        missing = [event for event in _EVENTS if not callable(getattr(found, event, None))]
        if missing:
            raise ValueError(
                f"log.to = {name!r}: has no {missing[0]}: give a class with the methods {', '.join(_EVENTS)}"
            )


def values_of(row: dict[str, Any], steps_per_epoch: int) -> tuple[int, dict[str, float]] | None:
    """The step of a row of ``metrics.jsonl`` and its numbers by name; None if loggers do not need it.

    An evaluation belongs to the last step of its epoch.
    """
    match row:
        case {"event": "train", "step": step, "block": block, "loss": loss, "terms": terms, "lr": rate}:
            where = f"block{block}" if isinstance(block, int) else block
            parts = terms if len(terms) > 1 else {}
            named = {f"train/{term}/{where}": value for term, value in parts.items()}
            return step, {f"train/loss/{where}": loss, **named, "train/lr": rate}
        case {"event": "eval", "epoch": epoch, "split": split}:
            about = ("epoch", "correct", "total", "time", "event_number")
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            named = {f"eval/{split}/{key}": value for key, value in numbers.items() if key not in about}
            return (epoch + 1) * steps_per_epoch - 1, named
    return None


class Loggers:
    """All loggers of a run that begins, or goes on, at `step`."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        settings = config.values(*Effect)
        self._followers = [_Follower(name, settings, run_dir, step) for name in config.log.to]
        self._evaluated: dict[str, float] = {}  # of an evaluation in progress
        self._rated = -1  # last step whose learning rate is logged: every block's row has it
        self._deadline = 0.0

    def row(self, row: dict[str, Any], sequence: ItemSequence | None) -> None:
        if not self._followers or sequence is None:
            return
        found = values_of(row, sequence.steps_per_epoch)
        if found is None:
            return
        step, values = found
        if row["event"] == "eval":
            # A run that is stopped in the middle of an evaluation evaluates the whole epoch again.
            self._evaluated |= values
            if row["split"] != sequence.splits[-1]:
                return
            values, self._evaluated = self._evaluated, {}
        if "train/lr" in values:
            if step <= self._rated:
                del values["train/lr"]
            self._rated = max(self._rated, step)
        for follower in self._followers:
            follower.offer(step, values)

    def problems(self) -> Iterator[str]:
        """What went wrong with loggers since the last call."""
        for follower in self._followers:
            if follower.problem:
                yield follower.problem
                follower.problem = ""

    def end(self, code: int, result: dict[str, Any] | None) -> None:
        """Let all finish; returns at once."""
        self._deadline = time.monotonic() + (FAILED_END_S if code == 1 else END_S)
        for follower in self._followers:
            follower.end(code, result or {})

    def close(self) -> Iterator[str]:
        """Wait until all have finished, as far as they do in time since `end`; what went wrong."""
        for follower in self._followers:
            follower.join(max(0.0, self._deadline - time.monotonic()))
            if follower.is_alive():
                yield f"log.to = {follower.to!r}: did not end in time; its last numbers may be missing"
            if follower.dropped:
                yield f"log.to = {follower.to!r}: was too slow, {follower.dropped} rows were left out"
        yield from self.problems()


class _Follower(threading.Thread):
    """A logger in its thread, and what waits for it."""

    def __init__(self, to: str, *beginning: Any) -> None:
        super().__init__(name=f"logger {to}", daemon=True)
        self.to = to
        self.problem = ""
        self.dropped = 0
        self._beginning = beginning
        self._waiting: dict[int, dict[str, float]] = {}
        self._end: tuple[int, dict[str, Any]] | None = None
        self._changed = threading.Condition()
        self.start()

    def offer(self, step: int, values: dict[str, float]) -> None:
        with self._changed:
            if step not in self._waiting and len(self._waiting) >= STEPS_WAITING:
                self.dropped += self.is_alive()
                return
            self._waiting.setdefault(step, {}).update(values)
            self._changed.notify()

    def end(self, code: int, result: dict[str, Any]) -> None:
        with self._changed:
            self._end = code, result
            self._changed.notify()

    def run(self) -> None:
        try:
            with blaming("log.to", self.to):
                self._follow()
        except Exception as error:
            about = "" if str(error).startswith("log.to") else f"log.to = {self.to!r}: "
            text = " ".join(str(error).split())[:500]
            self.problem = f"{about}{text}; the run goes on without this logger"

    def _follow(self) -> None:
        logger = LOGGERS.find(self.to)()
        logger.started(*self._beginning)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._end)
                taken, self._waiting = self._waiting, {}
            if not taken:
                break
            for step in sorted(taken):
                logger.metrics(step, taken[step])
        assert self._end is not None
        logger.finished(*self._end)
