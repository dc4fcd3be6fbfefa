"""``scpl-dist compare``: several methods on the same data and stages, one run after the other, and one table.

Every run is a process of its own, started like a user's, so that nothing of one run is left in the next. A run that
fails is a row of the table. The speed is compared with three others: back-propagation in one process, the same over
the stages (naive model parallelism), and GPipe with the number of micro-batches that a short trial shows to be best.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scpl_dist.commands import report
from scpl_dist.coordinator.status import shares
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.storage.run_folder import RunFolder

ONE_PROCESS = "bp, one process"
TRIAL_EPOCHS = 2
COLUMNS = {
    "method": "method",
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
"""Column in the CSV -> heading elsewhere."""

Say = Callable[[str], None]


@dataclass
class Entry:
    """A row: one method with its runs."""

    label: str
    settings: list[str]
    """Overrides ``section.key=value`` beyond those that all have."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """``result.json`` of each run that finished."""
    curves: list[list[tuple[float, float]]] = field(default_factory=list)
    """Of each run that finished, (seconds since its first item, test accuracy) after each epoch."""
    failure: str = ""
    """Why a run failed; empty if all finished."""
    parameters: tuple[int, int] | None = None
    """Of the blocks, and of the blocks with their heads; None if they are not known."""

    def values(self, key: str) -> list[float]:
        """A number of ``result.json`` of the runs that have it."""
        return [result[key] for result in self.results if result.get(key) is not None]

    @property
    def speed(self) -> float | None:
        """Mean samples per second."""
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
        """The cells that need no other method."""
        row = dict.fromkeys(COLUMNS, "") | {"method": self.label}
        if self.parameters is not None:
            row["parameters"], row["with_heads"] = (f"{count:,}" for count in self.parameters)
        if not self.results:
            return row | {"accuracy": "failed" if self.failure else ""}
        stages = [stage for result in self.results for stage in result["per_stage"]]
        steps = sum(result["steps"] for result in self.results)
        row["accuracy"] = self.spread("accuracy_last") + (" (some runs failed)" if self.failure else "")
        row["best"] = self.spread("accuracy_best")
        row["seconds"] = f"{statistics.fmean(self.values('wall_seconds')):.1f}"
        row["samples_per_second"] = f"{self.speed:.0f}" if self.speed is not None else ""
        row["busy"] = _busy(stages)
        row["bytes_per_step"] = f"{sum(stage['bytes_sent'] for stage in stages) / max(steps, 1) / 1e6:.2f}"
        row["peak_memory"] = f"{max(stage['peak_memory_bytes'] for stage in stages) / 1e6:.0f}"
        return row


def _busy(stages: Sequence[dict[str, Any]]) -> str:
    """Share of its time that a stage worked: of the least and of the most busy one, in per cent."""
    parts = [
        shares(stage["busy_seconds"], stage["waiting_seconds"], stage["blocked_seconds"]) for stage in stages
    ]
    busy = [100 * part[0] for part in parts if part is not None]
    return f"{min(busy):.0f} to {max(busy):.0f}" if busy else ""


@dataclass
class Comparison:
    """All rows, the folder that holds runs and tables, and one line about what was compared."""

    folder: Path
    entries: list[Entry]
    note: str

    def rows(self) -> list[dict[str, str]]:
        """The table as texts by column."""
        references = {
            "speedup_one": [entry for entry in self.entries if entry.label == ONE_PROCESS],
            "speedup_bp": [entry for entry in self.entries if entry.label == "bp"],
            "speedup_gpipe": [entry for entry in self.entries if entry.label.startswith("gpipe")],
        }
        rows = [entry.row() for entry in self.entries]
        for row, entry in zip(rows, self.entries, strict=True):
            for column, others in references.items():
                if entry.speed is not None and others and others[0].speed:
                    row[column] = f"{entry.speed / others[0].speed:.2f}"
        return rows

    def write(self) -> None:
        """Write ``comparison.csv``, ``comparison.md`` and ``accuracy.png``."""
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


def compare(
    methods: Sequence[str],
    config: Path | None,
    overrides: Sequence[str],
    seeds: int,
    micro_batches: Sequence[int],
    folder: Path,
    say: Say,
) -> Comparison:
    """Run everything.

    Args:
        methods: names of methods.
        config: configuration file; None takes the embedded defaults.
        overrides: for all runs.
        seeds: runs of each method, with ``run.seed`` counted up from the configured one.
        micro_batches: what to try for GPipe; one number is taken without a trial.
        folder: for the runs and the tables; must not exist, or be empty.
        say: told of each run that is over.

    Raises:
        ValueError: the configuration cannot be used with the first method, or the folder is not empty.
    """
    base = configuration.load(config, overrides)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--run-dir {folder}: not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shared = [*overrides, "metrics.port=0", "control.port=0"]
    entries = [
        Entry(name, [f"run.method={name}", "pipeline.micro_batches=1"]) for name in methods if name != "gpipe"
    ]
    if base.layout.world > 1:
        alone = ["run.method=bp", "pipeline.micro_batches=1", "pipeline.stages=1", "pipeline.replicas=1"]
        entries.append(Entry(ONE_PROCESS, [*alone, "pipeline.partition=uniform"]))
    if "gpipe" in methods:
        parts = _best_parts(config, shared, micro_batches, folder, say)
        entries.append(
            Entry(f"gpipe, {parts} parts", ["run.method=gpipe", f"pipeline.micro_batches={parts}"])
        )
    comparison = Comparison(folder, entries, _note(base, seeds))
    for entry in entries:
        for seed in range(base.run.seed, base.run.seed + seeds):
            name = f"{entry.label.replace(',', '').replace(' ', '-')}-seed{seed}"
            trial(entry, config, [*shared, *entry.settings, f"run.seed={seed}"], folder / name, say)
        entry.parameters = _parameters(config, [*shared, *entry.settings])
        comparison.write()  # after each method, so that an interrupted comparison leaves what it has
    return comparison


def trial(entry: Entry, config: Path | None, overrides: Sequence[str], run_dir: Path, say: Say) -> None:
    """One run in a process of its own; its result, or why it failed, goes into the entry."""
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
        say(f"{run_dir.name}: accuracy {result['accuracy_last']:.4f}, {speed}")
        return
    stored = folder.read("exit.json") or {}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("scpl-dist: ")
    entry.failure = str(stored.get("reason") or last)
    say(f"{run_dir.name}: failed: {entry.failure}")


def _best_parts(
    config: Path | None, shared: Sequence[str], choices: Sequence[int], folder: Path, say: Say
) -> int:
    """The number of micro-batches with which a short run of GPipe is fastest; the first if all fail."""
    speeds: dict[int, float] = {}
    for parts in choices if len(choices) > 1 else ():
        entry = Entry("gpipe", [])
        settings = ["run.method=gpipe", f"pipeline.micro_batches={parts}", f"run.epochs={TRIAL_EPOCHS}"]
        trial(entry, config, [*shared, *settings], folder / f"trial-gpipe-{parts}", say)
        speeds[parts] = entry.speed or 0.0
    return max(speeds, key=lambda parts: speeds[parts]) if speeds else choices[0]


def _curve(folder: RunFolder) -> list[tuple[float, float]]:
    rows = folder.metrics.rows()
    begin = next((row["time"] for row in rows if row["event"] == "start"), rows[0]["time"] if rows else 0.0)
    return [
        (row["time"] - begin, row["accuracy"])
        for row in rows
        if row["event"] == "eval" and row["split"] == "test"
    ]


def _parameters(config: Path | None, overrides: Sequence[str]) -> tuple[int, int] | None:
    from scpl_dist.launch import preflight

    try:
        plan = preflight.preflight(configuration.load(config, overrides), absent=lambda reason: None)
    except Exception:  # a model of the user's may raise anything; the runs have said what
        return None
    blocks = sum(plan.parameters)
    return blocks, blocks + sum(plan.head_parameters)


def _note(base: Config, seeds: int) -> str:
    stages, threads = base.pipeline.stages, base.runtime.threads
    workers = f" by {base.layout.world} workers" if base.layout.world > stages else ""
    return (
        f"{base.model.name} on {base.data.name}, batch {base.data.batch_size}, {base.run.epochs} epochs, "
        f"{stages} stage(s){workers} of {threads} thread(s), {seeds} seed(s); accuracy of the last epoch on the test "
        "part, mean and sample standard deviation."
    )
