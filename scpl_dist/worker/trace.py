"""Records what a worker does when, for ``scpl-dist trace`` and the timeline of a report.

The training thread only appends a few bytes to a list at each change of phase. Between two items the list goes to a
thread that writes it into the run folder, so that no disk ever holds up training.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scpl_dist.run.phases import Phase
from scpl_dist.storage import spans

STRETCH = 8  # steps in a row that are recorded out of `trace.every`
FLUSH_S = 1.0
LIMIT = 1 << 28  # bytes of a file
_NUMBERS = {phase: number for number, phase in enumerate(spans.PHASES)}


class Trace:
    """Spans and messages of one worker; all methods are for its training thread.

    `whose` are the fields of `scpl_dist.storage.spans.Recording` that do not change. OSError if no file can be made.
    """

    def __init__(self, log: Path, name: str, every: int, whose: dict[str, Any]) -> None:
        self.on = False  # whether the present item is recorded
        self._every = every
        self._file = spans.create(log, name, whose)
        self._records: list[bytes] = []
        self._sequence = 0
        self._step = 0
        self._last = b""  # of a message that came while nothing was recorded
        self._flushed = time.monotonic()
        self._sent: Counter[int] = Counter()
        self._taken: Counter[int] = Counter()
        self._full: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="trace", daemon=True)
        self._writer.start()

    def begin(self, sequence: int, step: int) -> None:
        """An item begins; what has been waited for before it belongs to it."""
        self._sequence, self._step = sequence, step
        before, self.on = self.on, self._every > 0 and step % self._every < STRETCH
        if self.on and not before and self._last:  # the first message of an item comes before the item begins
            self._records.append(self._last)
        self._last = b""
        now = time.monotonic()
        if self._records and now - self._flushed >= FLUSH_S:
            self._flushed = now
            self._hand_over()

    def span(self, phase: Phase, block: int, micro_batch: int, begin: float, end: float) -> None:
        """A phase of the present item is over."""
        place = (self._sequence, self._step, block, min(micro_batch, 0xFFFF))
        self._records.append(spans.RECORD.pack(begin, end, *place, _NUMBERS[phase]))

    def passed(self, sent: bool, rank: int) -> None:
        """A message was posted to a rank, or taken from it; they are counted also while nothing is recorded."""
        counter = self._sent if sent else self._taken
        number = counter[rank]
        counter[rank] += 1
        now = time.perf_counter()
        record = spans.RECORD.pack(now, now, number, rank, 0, 0, spans.SENT if sent else spans.TAKEN)
        if self.on:
            self._records.append(record)
        else:
            self._last = record

    def close(self, limit_s: float = 2.0) -> None:
        """Write what is left, for at most so many seconds."""
        self._hand_over()
        self._full.put(None)
        self._writer.join(limit_s)

    def _hand_over(self) -> None:
        self._full.put(self._records)
        self._records = []

    def _write(self) -> None:
        written = 0
        while (records := self._full.get()) is not None:
            if self._every == 0:
                continue
            content = b"".join(records)
            written += len(content)
            try:
                self._file.write(content)
            except OSError as error:
                self._stop(f"the trace cannot be written any more: {error}")
            if written >= LIMIT:
                self._stop(f"the trace has {LIMIT >> 20} MiB, and ends here; set trace.every higher")
        self._file.close()

    def _stop(self, text: str) -> None:
        self._every = 0
        print(f"warning: {text}", file=sys.stderr, flush=True)
