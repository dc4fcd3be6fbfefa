"""``scpl-dist compare``: several methods on the same data and stages, one run after the other, and one table.

Every run is a process of its own, started like a user's, so that nothing of one run is left in the next. The speed
is compared with three others: back-propagation in one process, the same over the stages (naive model parallelism), and
GPipe with the number of micro-batches that a short trial shows to be best.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scpl_dist.commands import report
from scpl_dist.coordinator.status import shares
from scpl_dist.launch import preflight
from scpl_dist.methods import resolve
from scpl_dist.plan.forecast import cores
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.storage.run_folder import RunFolder

ONE_PROCESS = "bp, one process"
# Column in the CSV -> heading elsewhere.
COLUMNS = {
    "method": "method",
    "threads": "workers x threads",
    "accuracy": "accuracy %",
    "best": "best epoch %",
    "seconds": "seconds",
    "samples_per_second": "samples/s",
    "speedup_one": "x BP, one process",
    "speedup_bp": "x BP, same stages",
    "speedup_gpipe": "x GPipe",
    "busy": "busy %",
    "bytes_per_step": "MB sent/step",
    "peak_memory": "peak MB/stage",
    "parameters": "parameters",
    "with_heads": "with heads",
}


@dataclass
class Entry:
    """A row: one method with its runs."""

    label: str
    settings: list[str]  # overrides beyond those that all have
    results: list[dict[str, Any]] = field(default_factory=list)  # result.json of each run that finished
    curves: list[report.Curve] = field(default_factory=list)  # of the same runs
    failure: str = ""  # why a run failed
    threads: str = ""  # such as "2 x 1": workers, and threads of each
    parameters: tuple[int, int] | None = None  # of the blocks, and of the blocks with their heads

    def values(self, key: str) -> list[float]:
        return [result[key] for result in self.results if result.get(key) is not None]

    @property
    def speed(self) -> float | None:
        found = self.values("samples_per_second")
        return statistics.fmean(found) if found else None

    def spread(self, key: str) -> str:
        """Mean and sample standard deviation of a share, in per cent."""
        found = [100 * value for value in self.values(key)]
        if not found:
            return ""
        deviation = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.2f}{deviation}"

    def row(self) -> dict[str, str]:
        row = dict.fromkeys(COLUMNS, "") | {"method": self.label, "threads": self.threads}
        if self.parameters is not None:
            row["parameters"], row["with_heads"] = (f"{count:,}" for count in self.parameters)
        if not self.results:
            return row | {"accuracy": "failed" if self.failure else ""}
        stages = [stage for result in self.results for stage in result["per_stage"]]
        steps = sum(result["steps"] for result in self.results)
        times = [[stage[f"{kind}_seconds"] for kind in ("busy", "waiting", "blocked")] for stage in stages]
        busy = [100 * part[0] for part in (shares(*seconds) for seconds in times) if part is not None]
        row["accuracy"] = self.spread("accuracy_last") + (" (some runs failed)" if self.failure else "")
        row["best"] = self.spread("accuracy_best")
        row["seconds"] = f"{statistics.fmean(self.values('wall_seconds')):.1f}"
        row["samples_per_second"] = f"{self.speed:.0f}" if self.speed is not None else ""
        row["busy"] = f"{min(busy):.0f} to {max(busy):.0f}" if busy else ""
        row["bytes_per_step"] = f"{sum(stage['bytes_sent'] for stage in stages) / max(steps, 1) / 1e6:.2f}"
        row["peak_memory"] = f"{max(stage['peak_memory_bytes'] for stage in stages) / 1e6:.0f}"
        return row


@dataclass
class Comparison:
    """All rows, the folder that holds runs and tables, and one line about what was compared."""

    folder: Path
    entries: list[Entry]
    note: str

    def rows(self) -> list[dict[str, str]]:
        references = {ONE_PROCESS: "speedup_one", "bp": "speedup_bp", "gpipe": "speedup_gpipe"}
        rows = [entry.row() for entry in self.entries]
        for reference in self.entries:
            column = references.get("gpipe" if reference.label.startswith("gpipe") else reference.label)
            for row, entry in zip(rows, self.entries, strict=True):
                if column and reference.speed and entry.speed is not None:
                    row[column] = f"{entry.speed / reference.speed:.2f}"
        return rows

    def write(self) -> None:
        rows = self.rows()
        with (self.folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, "failure"])
            writer.writeheader()
            for row, entry in zip(rows, self.entries, strict=True):
                writer.writerow(row | {"failure": entry.failure})
        table = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *(list(row.values()) for row in rows)]
        lines = [self.note, "", *(f"| {' | '.join(cells)} |" for cells in table)]
        lines += [f"\n{entry.label} failed: {entry.failure}" for entry in self.entries if entry.failure]
        (self.folder / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        curves = {entry.label: entry.curves for entry in self.entries if entry.curves}
        report.accuracy_against_time(curves, self.folder / "accuracy.png")
        if curves:
            report.write(self.folder)


def compare(
    methods: Sequence[str],
    config: Path | None,
    overrides: Sequence[str],
    seeds: int,
    micro_batches: Sequence[int],
    folder: Path,
) -> Comparison:
    """Run everything into a new folder, each method with as many `seeds`, counted up from the configured one.

    `micro_batches` are what to try for GPipe; one number is taken without a trial.
    """
    base = configuration.load(config, overrides)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--run-dir {folder}: not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shared = [*overrides, "metrics.port=0", "control.port=0"]
    own = {name: own_settings(name, base) for name in (*methods, "bp")}
    whole = "pipeline.micro_batches=1"
    entries = [Entry(name, [*own[name], whole]) for name in methods if name != "gpipe"]
    if base.layout.world > 1:
        alone = [*own["bp"], whole, "pipeline.stages=1", "pipeline.replicas=1"]
        # It has the cores that the workers have in all, or it would be slow for want of them.
        alone += ["pipeline.partition=uniform", f"runtime.threads={_threads_in_all(base)}"]
        entries.append(Entry(ONE_PROCESS, alone))
    if "gpipe" in methods:
        parts = _best_parts(config, [*shared, *own["gpipe"]], micro_batches, folder)
        entries.append(Entry(f"gpipe, {parts} parts", [*own["gpipe"], f"pipeline.micro_batches={parts}"]))
    comparison = Comparison(folder, entries, _note(base, seeds))
    for number, entry in enumerate(entries):
        for turn, seed in enumerate(range(base.run.seed, base.run.seed + seeds)):
            name = f"{entry.label.replace(',', '').replace(' ', '-')}-seed{seed}"
            _say(f"run {number * seeds + turn + 1} of {len(entries) * seeds}: {name}")
            trial(entry, config, [*shared, *entry.settings, f"run.seed={seed}"], folder / name)
        settled = configuration.load(config, [*shared, *entry.settings])
        entry.threads = f"{settled.layout.world} x {settled.runtime.threads}"
        entry.parameters = _parameters(settled)
        comparison.write()  # after each method, so that an interrupted comparison leaves what it has
    return comparison


def own_settings(method: str, base: Config) -> list[str]:
    """Overrides that choose a method, and take back those of the shared settings that it does not read."""
    unread = resolve(method).unread(base)
    if unread:
        print(
            f"warning: {', '.join(unread)}: not for the method {method}, which does not read this",
            file=sys.stderr,
        )
    return [f"run.method={method}", *(f"{key}={json.dumps(value)}" for key, value in unread.items())]


def _threads_in_all(base: Config) -> int:
    return max(base.runtime.threads, min(cores(), base.layout.world * base.runtime.threads))


def trial(entry: Entry, config: Path | None, overrides: Sequence[str], run_dir: Path) -> None:
    """One run in a process of its own; its result, or why it failed, goes into the entry and is said."""
    command = [sys.executable, "-m", "scpl_dist", "train", *([str(config)] if config else [])]
    command += [part for text in overrides for part in ("-o", text)] + ["--run-dir", str(run_dir)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    folder = RunFolder(run_dir)
    result = folder.read("result.json")
    if done.returncode == 0 and result is not None:
        entry.results.append(result)
        entry.curves.append(_curve(folder))
        speed = f"{result['samples_per_second'] or 0:.0f} samples/s"
        text = f"accuracy {result['accuracy_last']:.4f}, {speed}, {result['wall_seconds']:.0f} s"
    else:
        stored = folder.read("exit.json") or {}
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("scpl-dist: ")
        entry.failure = str(stored.get("reason") or last)
        text = f"failed: {entry.failure}"
    _say(f"{run_dir.name}: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _best_parts(config: Path | None, shared: Sequence[str], choices: Sequence[int], folder: Path) -> int:
    """The number of micro-batches with which a short run of GPipe is fastest; the first if all fail."""
    entries = {parts: Entry("gpipe", []) for parts in choices}
    for parts, entry in entries.items() if len(choices) > 1 else ():
        _say(f"two epochs of gpipe with {parts} micro-batches, to see with how many it is fastest")
        settings = [f"pipeline.micro_batches={parts}", "run.epochs=2"]
        trial(entry, config, [*shared, *settings], folder / f"trial-gpipe-{parts}")
    return max(entries, key=lambda parts: entries[parts].speed or 0.0)


def _curve(folder: RunFolder) -> report.Curve:
    rows = folder.metrics.rows()
    begin = next((row["time"] for row in rows if row["event"] == "start"), rows[0]["time"] if rows else 0.0)
    tests = [row for row in rows if row["event"] == "eval" and row["split"] == "test"]
    return [(row["time"] - begin, row["accuracy"]) for row in tests]


def _parameters(config: Config) -> tuple[int, int] | None:
    try:
        plan = preflight.preflight(config, absent=lambda reason: None)
    except Exception:  # a model of the user's may raise anything; the runs have said what
        return None
    return sum(plan.parameters), sum(plan.parameters) + sum(plan.head_parameters)


def _note(base: Config, seeds: int) -> str:
    stages, threads = base.pipeline.stages, base.runtime.threads
    workers = f" by {base.layout.world} workers" if base.layout.world > stages else ""
    return (
        f"{base.model.name} on {base.data.name}, batch {base.data.batch_size}, {base.run.epochs} epochs, "
        f"{stages} stage(s){workers} of {threads} thread(s), {seeds} seed(s); accuracy of the last epoch on the test "
        "part, mean and sample standard deviation."
    )
