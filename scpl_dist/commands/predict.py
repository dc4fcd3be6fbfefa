"""``scpl-dist predict``: what a trained model says of new inputs, which are read from files batch by batch."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from scpl_dist.commands import saved
from scpl_dist.commands.answers import Exits, answers, checked, in_portions
from scpl_dist.commands.saved import SavedRun
from scpl_dist.data import Preprocessing
from scpl_dist.methods.block import TrainableBlock

FORMATS = (".csv", ".jsonl")
_PATIENCE_S = 5.0  # seconds without a word


@dataclass(frozen=True)
class Prediction:
    """The answer for one input."""

    label: str  # name of the class
    probability: float  # of that class
    block: int  # the block that answered, from 0
    probabilities: list[float]  # of all classes, in their order


def predict(
    run_dir: Path,
    source: Path,
    target: Path | None = None,
    checkpoint: str | None = None,
    threshold: float | None = None,
    depth: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    everything: bool = False,
    low_memory: bool = False,
) -> int:
    """Write a row for each input of a file or folder, as CSV on the standard output without a `target`.

    `everything` writes the probabilities of all classes. Returns the number of inputs; ValueError for an input that is
    none, and then there is no `target`.
    """
    if target is not None:
        _check(target)
    run = saved.find(run_dir, checkpoint, device)
    option = f"--depth {depth}" if threshold is None else f"--exit-threshold {threshold}"
    exits = Exits(run.plan, depth, threshold, option)
    made = preprocessing(run)
    blocks = run.blocks(low_memory, exits.depth)
    found = predictions(run, blocks, exits, made.read(source), run.device, batch_size, low_memory)
    names = run.classes if everything else []
    count = 0
    with _opened(target) as file:
        write = _writer(file, target, names)
        for name, prediction in _with_a_word(found):
            write(name, prediction)
            count += 1
        if not count:
            raise ValueError(f"{source}: has no inputs")
    for text in made.doubts():
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return count


def preprocessing(run: SavedRun) -> Preprocessing:
    """What makes inputs of raw ones; ValueError if that is not known."""
    if run.preprocessing is None:
        raise ValueError(
            f"data.name = {run.plan.config.data.name!r}: does not say what makes inputs of raw ones, so only tensors "
            "can be given to the model, in Python; give its DataSource a preprocessing, see docs/using_the_result.md"
        )
    return run.preprocessing


def predictions(
    run: SavedRun,
    blocks: Mapping[int, TrainableBlock],
    exits: Exits,
    inputs: Iterable[tuple[Any, Any]],
    device: torch.device,
    batch_size: int | None = None,
    low_memory: bool = False,
) -> Iterator[tuple[Any, Prediction]]:
    """Answers for raw inputs that come with a name each, in their order."""
    size = checked(batch_size, run.plan.config.data.batch_size)
    made, classes = preprocessing(run), run.classes
    for portion in in_portions(_in_batches(inputs, size), low_memory):
        batches = [made.batch([raw for _, raw in batch]) for batch in portion]
        found: list[list[Prediction | None]] = [[None] * len(batch) for batch in portion]
        for answer in answers(run.plan, blocks, batches, exits, device):
            probabilities = run.plan.method.probabilities(answer.scores).float().cpu()
            best = probabilities.argmax(1).tolist()
            for row, label, given in zip(answer.rows.tolist(), best, probabilities.tolist(), strict=True):
                found[answer.batch][row] = Prediction(classes[label], given[label], answer.block, given)
        for batch, answered in zip(portion, found, strict=True):
            for (name, _), prediction in zip(batch, answered, strict=True):
                assert prediction is not None
                yield name, prediction


def _in_batches(inputs: Iterable[tuple[Any, Any]], size: int) -> Iterator[list[tuple[Any, Any]]]:
    left = iter(inputs)
    while batch := [entry for _, entry in zip(range(size), left, strict=False)]:
        yield batch


def _check(target: Path) -> None:
    if target.suffix not in FORMATS:
        raise ValueError(f"-o {target}: unknown format; end the name in one of {', '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise ValueError(f"-o {target}: there is no folder {target.parent}; make it first")


@contextlib.contextmanager
def _opened(target: Path | None) -> Iterator[TextIO]:
    """The standard output, or a file that is there under its name when all is in it."""
    if target is None:
        yield sys.stdout
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, target)
    except OSError as error:
        raise ValueError(f"-o {target} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _writer(file: TextIO, target: Path | None, classes: list[str]) -> Callable[[str, Prediction], None]:
    if target is not None and target.suffix == ".jsonl":

        def line(name: str, found: Prediction) -> None:
            row: dict[str, Any] = {"input": name, "label": found.label, "probability": found.probability}
            row["block"] = found.block
            if classes:
                row["probabilities"] = dict(zip(classes, found.probabilities, strict=True))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        return line
    table = csv.writer(file, lineterminator="\n")
    heading = iter([["input", "label", "probability", "block", *classes]])

    def row(name: str, found: Prediction) -> None:
        table.writerows(heading)  # with the first row: an input that is none is heard before
        others = [f"{value:.6f}" for value in found.probabilities] if classes else []
        table.writerow([name, found.label, f"{found.probability:.6f}", found.block, *others])

    return row


def _with_a_word(found: Iterator[tuple[str, Prediction]]) -> Iterator[tuple[str, Prediction]]:
    """The same, and now and then how far that is."""
    said = time.monotonic()
    for number, entry in enumerate(found, start=1):
        yield entry
        if time.monotonic() - said > _PATIENCE_S:
            said = time.monotonic()
            print(f"{number} inputs predicted", file=sys.stderr, flush=True)
