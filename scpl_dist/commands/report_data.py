"""What ``report.html`` shows of a run, as plain values: from its folder alone, and as far as that has it.

Runs of earlier versions have less: no model table, no course of the stages' time, no timeline.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scpl_dist.commands.runs import state_of
from scpl_dist.commands.timeline import Lane, arrows, lanes
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.run.layout import Layout
from scpl_dist.run.phases import Phase
from scpl_dist.run.scores import CONFUSION
from scpl_dist.storage.metrics_log import begin_of
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.storage.spans import PHASES

POINTS = 800  # of a line; more cannot be seen
SPANS = 60_000  # of a timeline: some megabytes
INTERVALS = 240  # of a course over time
LEAST_S = 0.3  # an interval; the last row of a run may follow at once on the one before
SHOWN_STEPS = 5  # of a timeline at first

Row = Mapping[str, Any]


def of_run(run_dir: Path, name: str = "") -> dict[str, Any]:
    """All of one run; ValueError if it is none, or has not begun."""
    folder = RunFolder(run_dir)
    rows = folder.metrics.rows()
    if not rows:
        raise ValueError(f"{run_dir} is no run folder, or its run has not begun: it has no metrics.jsonl")
    path = run_dir / "config.toml"
    config = configuration.load(path) if path.is_file() else None
    begin = begin_of(rows)
    result = folder.read("result.json")
    layout = config.layout if config else Layout([1] * (result or {}).get("stages", 1))
    workers = sorted(layout.workers, key=lambda worker: (worker.stage, worker.replica))
    train = [row for row in rows if row["event"] == "train"]
    return {
        "name": name or run_dir.resolve().name,
        "state": state_of(run_dir, folder.read("exit.json")),
        "begun": begin,
        "result": result,
        "labels": [worker.label for worker in workers],
        "steps": 1 + max((row["step"] for row in train), default=-1),
        "blocks": (folder.read("model.json") or {}).get("blocks", []),
        "losses": _losses(train, begin),
        "evaluations": _evaluations(rows, train, begin),
        "confusion": _confusion(rows),
        "usage": _usage(rows, [worker.rank for worker in workers], begin),
        "links": _links(result, layout),
        "marks": _marks(rows, begin),
        "settings": _settings(config),
        "timeline": _timeline(run_dir),
    }


def _since(row: Row, begin: float | None) -> float | None:
    return None if begin is None or "time" not in row else round(row["time"] - begin, 3)


def _losses(train: Sequence[Row], begin: float | None) -> list[dict[str, Any]]:
    """Step, seconds and loss of each block; means of neighbours where there are more than can be seen."""
    blocks: dict[int, list[Row]] = defaultdict(list)
    for row in train:
        blocks[row["block"]].append(row)
    found = []
    for block, rows in sorted(blocks.items()):
        size = -(-len(rows) // POINTS)
        groups = [rows[place : place + size] for place in range(0, len(rows), size)]
        points = [
            [
                group[-1]["step"],
                _since(group[-1], begin),
                _short(statistics.fmean(row["loss"] for row in group)),
            ]
            for group in groups
        ]
        found.append({"block": block, "points": points})
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _evaluations(rows: Sequence[Row], train: Sequence[Row], begin: float | None) -> list[dict[str, Any]]:
    ends: dict[int, int] = {}
    for row in train:
        ends[row["epoch"]] = max(ends.get(row["epoch"], 0), row["step"] + 1)
    keys = ("epoch", "split", "accuracy", "loss")
    return [
        {key: row.get(key) for key in keys} | {"step": ends.get(row["epoch"]), "seconds": _since(row, begin)}
        for row in rows
        if row["event"] == "eval"
    ]


def _confusion(rows: Sequence[Row]) -> dict[str, Any] | None:
    found = [row for row in rows if row["event"] == "eval" and CONFUSION in row]
    if not found:
        return None
    last = found[-1]
    return {"matrix": last[CONFUSION], "split": last["split"], "epoch": last["epoch"]}


def _usage(rows: Sequence[Row], ranks: Sequence[int], begin: float | None) -> list[Any]:
    """Seconds, and for each worker what it was busy, waiting, blocked since the row before, bytes a second, memory."""
    before: dict[int, Row] = {}
    then = -math.inf
    found: list[Any] = []
    usage = [row for row in rows if row["event"] == "usage"]
    size = -(-len(usage) // INTERVALS)
    for row in usage[::-1][:: size or 1][::-1]:  # the last one is among them
        now = {worker["rank"]: worker for worker in row["workers"]}
        at = _since(row, begin) or 0.0
        if at - then < LEAST_S or any(rank not in now for rank in ranks):
            continue
        if before:
            found.append([at, [_grown(before[rank], now[rank], at - then) for rank in ranks]])
        before, then = now, at
    return found


def _grown(before: Row, now: Row, seconds: float) -> list[float]:
    if now["busy"] < before["busy"]:  # a counter that has fallen is that of a new process
        before = defaultdict(int)
    times = [round(max(0.0, now[key] - before[key]), 3) for key in ("busy", "waiting", "blocked")]
    sent = max(0, now["bytes_sent"] - before["bytes_sent"])
    return [*times, round(sent / seconds), now["peak_memory"]]


def _links(result: Mapping[str, Any] | None, layout: Layout) -> list[dict[str, int]]:
    """Bytes from stage to stage."""
    sums: dict[tuple[int, int], int] = defaultdict(int)
    for stage in (result or {}).get("per_stage", []):
        for rank, count in stage.get("bytes_to", {}).items():
            sums[stage["stage"], layout.workers[int(rank)].stage] += count
    return [
        {"from": source, "to": target, "bytes": count} for (source, target), count in sorted(sums.items())
    ]


def _marks(rows: Sequence[Row], begin: float | None) -> list[dict[str, Any]]:
    found = []
    step = 0
    for row in rows:
        match row:
            case {"event": "train", "step": int(trained)}:
                step = max(step, trained)
                continue
            case {"event": "checkpoint"}:
                text = f"step {row['step']}, {row['bytes'] / 1e6:.1f} MB in {row['seconds']:.2f} s"
            case {"event": "restart"}:
                text = f"{row['number']}: {row['reason']}"
            case {"event": "warning"}:
                text = row["text"]
            case _:
                continue
        found.append(
            {"kind": row["event"], "text": text, "seconds": _since(row, begin), "step": row.get("step", step)}
        )
    return found


def _settings(config: Config | None) -> list[list[str]]:
    """Key, value, default and meaning of what was set."""
    if config is None:
        return []
    found = []
    for name, usual in Config():
        section = getattr(config, name)
        if isinstance(section, list):  # tables for some blocks
            if section:
                tables = [table.model_dump(mode="json", exclude_defaults=True) for table in section]
                meaning = Config.model_fields[name].description or ""
                found.append([name, json.dumps(tables), "[]", " ".join(meaning.split())])
            continue
        for key, field in type(section).model_fields.items():
            here, there = getattr(section, key), getattr(usual, key)
            if here != there:
                meaning = " ".join((field.description or "").replace("``", "").split())
                found.append([f"{name}.{key}", json.dumps(here), json.dumps(there), meaning])
    return found


def _timeline(run_dir: Path) -> dict[str, Any]:
    """The recorded spans, as columns of milliseconds since the first; the first `SPANS` where there are more.

    Without spans, or if they are on clocks that were not compared, a note why there is no timeline.
    """
    try:
        found = lanes(run_dir)
    except ValueError as error:
        return {"note": f"There is none: {error}", "lanes": []}
    start = min(lane.shifted(lane.recording.spans[0].begin) for lane in found)
    ends = sorted(lane.shifted(span.end) for lane in found for span in lane.recording.spans)
    end = ends[min(SPANS, len(ends)) - 1]
    columns = [_columns(lane, start, end) for lane in found]
    several = any(any(column["m"]) for column in columns)
    note = (
        "What each stage did, on one clock, with messages as arrows. F forward, L loss, B backward, U update, of a "
        "block; S send, E evaluation, D data, C checkpoint."
    )
    if len(ends) > SPANS:
        note += f" The first {end - start:.1f} s of the record; all of it is in scpl-dist trace."
    error_s = max(lane.error_s for lane in found)
    if error_s:
        note += f" The hosts' clocks agree to {1000 * error_s:.2g} ms."
    return {
        "note": note,
        "phases": PHASES,
        "begin": 0,
        "lanes": columns,
        "parts": several,
        "view": _view(columns),
        "arrows": [
            [arrow.source, arrow.target, _ms(arrow.sent, start), _ms(arrow.taken, start)]
            for arrow in arrows(found)
            if arrow.taken <= end
        ],
    }


def _ms(at: float, start: float) -> float:
    return round(1000 * (at - start), 3)


def _columns(lane: Lane, start: float, end: float) -> dict[str, Any]:
    spans = [span for span in lane.recording.spans if lane.shifted(span.end) <= end]
    times = [_ms(lane.shifted(span.begin), start) for span in spans]
    return {
        "label": f"stage {lane.label}",
        "t": times,
        "d": [round(max(0.0, 1000 * (span.end - span.begin)), 3) for span in spans],
        "p": [PHASES.index(Phase(span.phase)) for span in spans],
        "b": [span.block for span in spans],
        "m": [span.micro_batch for span in spans],
        "s": [span.step for span in spans],
    }


def _view(columns: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """A few steps in the middle of the run, milliseconds: in the whole of it nothing can be told apart."""
    column = columns[-1]
    steps = sorted(set(column["s"]))
    if len(steps) <= SHOWN_STEPS:
        return None
    first = len(steps) // 2
    begin = bisect.bisect_left(column["s"], steps[first])
    end = bisect.bisect_left(column["s"], steps[min(first + SHOWN_STEPS, len(steps) - 1)])
    found = [column["t"][begin], column["t"][min(end, len(column["t"]) - 1)]]
    return found if found[1] > found[0] else None
