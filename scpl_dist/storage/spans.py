"""``log/trace/``: what each worker did when, as far as ``trace.every`` has it recorded.

A file for each process of a worker: a line of JSON that says whose it is, then records of equal size in the order of
time. Times are seconds on the monotonic clock of the worker's machine, whose name is the "boot": processes with the
same one share the clock, also in different containers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scpl_dist.run.phases import Phase

PHASES = tuple(Phase)  # their places are the numbers in a record; the file has their names
SENT, TAKEN = 254, 255  # in the place of a phase: a message was posted to, or taken from, another rank
RECORD = struct.Struct("<ddIIhHB")  # begin, end, sequence or number, step or rank, block, micro-batch, phase


@dataclass(frozen=True, slots=True)
class Span:
    """A phase from beginning to end; `block` is -1 where it is of no block."""

    phase: str
    begin: float
    end: float
    sequence: int  # of the item, counted in the generation
    step: int
    block: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Passed:
    """A message on its way: the `number`-th from one rank to another."""

    sent: bool  # or taken
    at: float
    rank: int  # the other one
    number: int


@dataclass(frozen=True, slots=True)
class Recording:
    """All of one process of a worker."""

    rank: int
    stage: int
    replica: int
    host: str
    boot: str
    generation: str
    spans: list[Span]
    messages: list[Passed]


def create(log: Path, name: str, whose: dict[str, Any]) -> BinaryIO:
    """A new file for a process of the worker `name`, unbuffered, with its first line; OSError if that cannot be."""
    folder = log / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        try:
            file = (folder / f"{name}.{number}.spans").open("xb", buffering=0)
            break
        except FileExistsError:  # of an earlier start
            number += 1
    file.write(json.dumps(whose | {"boot": boot(), "phases": PHASES}).encode() + b"\n")
    return file


def boot() -> str:
    """Name of this machine's clock: it is the same in all containers of a machine, and another one after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: no other machine is called like this either
        return "this machine"


def recordings(log: Path) -> Iterator[Recording]:
    """What is there, in the order of ranks and starts; a record that was cut off is left out."""
    found = [_read(path) for path in (log / "trace").glob("*.spans")]
    whole = [one for one in found if one is not None]
    yield from sorted(whole, key=lambda one: (one.rank, one.spans[0].begin if one.spans else 0.0))


def _read(path: Path) -> Recording | None:
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        whose = json.loads(head)
    except ValueError:  # the process has been killed before its first line was there
        return None
    phases = whose.pop("phases")
    spans, messages = [], []
    for begin, end, number, step, block, part, phase in RECORD.iter_unpack(
        body[: len(body) // RECORD.size * RECORD.size]
    ):
        if phase in (SENT, TAKEN):
            messages.append(Passed(phase == SENT, begin, step, number))
        else:
            spans.append(Span(phases[phase], begin, end, number, step, block, part))
    return Recording(**whose, spans=spans, messages=messages)
