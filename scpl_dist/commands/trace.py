"""``scpl-dist trace``: what all stages did when, in the format of Chrome's and Perfetto's trace viewers.

Open it at https://ui.perfetto.dev (which keeps it on this machine) or at chrome://tracing.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scpl_dist.commands.timeline import Lane, arrows, lanes, title

Event = dict[str, Any]


def write(run_dir: Path, target: Path | None = None) -> tuple[Path, str]:
    """The file, ``RUN_DIR/trace.json.gz`` if None, and a line about what is in it; compressed if it ends in .gz."""
    found = lanes(run_dir)
    target = target or run_dir / "trace.json.gz"
    error_s = max(lane.error_s for lane in found)
    content = {
        "traceEvents": list(_events(found)),
        "displayTimeUnit": "ms",
        "otherData": {"run": run_dir.name, "clock_error_us": round(error_s * 1e6, 1)},
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    try:
        target.write_bytes(gzip.compress(text, 6, mtime=0) if target.suffix == ".gz" else text)
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error.strerror}): name another file") from None
    spans = sum(len(lane.recording.spans) for lane in found)
    clock = f"clocks of the hosts agree to {1000 * error_s:.2g} ms" if error_s else "one host, one clock"
    return target, f"{spans} spans of {len(found)} workers; {clock}"


def _events(found: Sequence[Lane]) -> Iterator[Event]:
    start = min(lane.shifted(lane.recording.spans[0].begin) for lane in found)

    def micros(at: float) -> float:
        return round((at - start) * 1e6, 1)

    def of_lane(place: int) -> dict[str, int]:
        return {"pid": place, "tid": found[place].recording.rank}

    for place, lane in enumerate(found):
        one = lane.recording
        of = of_lane(place)
        names = {"process_name": f"stage {lane.label} on {one.host}", "thread_name": f"rank {one.rank}"}
        for name, text in names.items():
            yield {"ph": "M", "name": name, "args": {"name": text}} | of
        yield {"ph": "M", "name": "process_sort_index", "args": {"sort_index": place}} | of
        for span in one.spans:
            begin, end = micros(lane.shifted(span.begin)), micros(lane.shifted(span.end))
            args = {"step": span.step, "item": span.sequence, "micro_batch": span.micro_batch}
            event = {
                "ph": "X",
                "name": title(span),
                "cat": span.phase,
                "ts": begin,
                "dur": max(0.0, end - begin),
            }
            yield event | of | {"args": args}
    for number, arrow in enumerate(arrows(found)):
        message = {"id": number, "name": "message", "cat": "message"}
        yield {"ph": "s", "ts": micros(arrow.sent)} | message | of_lane(arrow.source)
        # It ends in the slice around it, not in the next one.
        yield {"ph": "f", "bp": "e", "ts": micros(arrow.taken)} | message | of_lane(arrow.target)
