"""``scpl-dist report``: a page and a picture of a run, drawn without a display."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scpl_dist.commands.report_page import page
from scpl_dist.coordinator.status import shares
from scpl_dist.run.scores import CONFUSION
from scpl_dist.storage.run_folder import RunFolder

# Distinguishable with the common kinds of colour blindness (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Curve = Sequence[tuple[float, float]]  # (seconds, accuracy) after each epoch


def accuracy_against_time(curves: Mapping[str, Sequence[Curve]], target: Path) -> None:
    """Test accuracy over the seconds since the start of training, a colour a method, a thin line a run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, runs) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        for run in runs if len(runs) > 1 else ():
            _line(axes, run, **style, alpha=0.3, linewidth=0.8)
        epochs = zip(*runs, strict=False)
        middle = [tuple(map(statistics.fmean, zip(*points, strict=True))) for points in epochs]
        _line(axes, middle, **style, label=label, marker="o" if len(middle) < 40 else None, markersize=3)
    axes.set_xlim(left=0)
    _finish(axes, "seconds since the start of training, evaluations included", "test accuracy (%)", "")
    figure.savefig(target, dpi=120)


def _line(axes: Axes, points: Sequence[tuple[float, ...]], **style: Any) -> None:
    axes.plot([x for x, _ in points], [100 * y for _, y in points], **style)


def write(run_dir: Path, target: Path | None = None) -> list[Path]:
    """Write ``report.html`` and ``report.png`` into the folder of a run, or the one file `target`, by its ending.

    The folder of a comparison has a page only; its picture is there already.
    """
    compared = (run_dir / "comparison.csv").is_file()
    if target is not None and target.suffix == ".html":
        return [_write_page(run_dir, target)]
    if target is not None:
        return [report(run_dir, target)]
    written = [_write_page(run_dir, run_dir / "report.html")]
    return written if compared else [*written, report(run_dir)]


def _write_page(run_dir: Path, target: Path) -> Path:
    text = page(run_dir)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error.strerror}): name another file") from None
    return target


def report(run_dir: Path, target: Path | None = None) -> Path:
    """Losses, accuracies and the stages' time of one run, as a PNG file; None writes ``RUN_DIR/report.png``.

    The confusion matrix of its last evaluation too, where ``task.metrics`` has it.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} is no run folder, or its run has not begun: it has no metrics.jsonl")
    folder = RunFolder(run_dir)
    rows = folder.metrics.rows()
    matrices = [row for row in rows if row["event"] == "eval" and CONFUSION in row]
    figure = Figure(figsize=(18, 4.2) if matrices else (13, 4.2), layout="constrained")
    losses, accuracies, times, *rest = figure.subplots(1, 4 if matrices else 3)
    _losses(losses, [row for row in rows if row["event"] == "train"])
    _accuracies(accuracies, [row for row in rows if row["event"] == "eval"])
    _times(times, (folder.read("result.json") or {}).get("per_stage", []))
    if matrices:
        _confusion(rest[0], matrices[-1])
    target = target or run_dir / "report.png"
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error.strerror}): name another file") from None
    return target


def _losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    blocks: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        blocks[row["block"]].append((row["step"], row["loss"]))
    for number, (block, points) in enumerate(sorted(blocks.items())):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=1, label=f"block {block}")
    _finish(axes, "step", "loss, all terms", "Training loss")


def _accuracies(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, split in enumerate(("validation", "test")):
        points = sorted((row["epoch"] + 1, row["accuracy"]) for row in rows if row["split"] == split)
        if points:
            _line(axes, points, color=COLOURS[number], marker="o", markersize=3, label=split)
    _finish(axes, "epochs done", "accuracy (%)", "Accuracy")


def _confusion(axes: Axes, row: Mapping[str, Any]) -> None:
    """Each label's samples by answer, in shares, so that rare classes are seen as well."""
    shares_of_labels = [[100 * cell / (sum(cells) or 1) for cell in cells] for cells in row[CONFUSION]]
    image = axes.imshow(shares_of_labels, cmap="Blues", vmin=0, vmax=100)
    axes.figure.colorbar(image, ax=axes, label="share of the label's samples (%)")
    title = f"Confusion, {row['split']}, epoch {row['epoch'] + 1}"
    axes.set(xlabel="answer", ylabel="label", title=title)


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _times(axes: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    kinds = (("busy", COLOURS[2]), ("waiting", COLOURS[5]), ("blocked", COLOURS[1]))
    parts = [shares(*(stage[f"{kind}_seconds"] for kind, _ in kinds)) or (0.0, 0.0, 0.0) for stage in stages]
    replicated = any(stage.get("replica") for stage in stages)
    names = [f"stage {stage['stage']}" + (f".{stage['replica']}" if replicated else "") for stage in stages]
    left = [0.0] * len(stages)
    for number, (kind, colour) in enumerate(kinds):
        widths = [100 * part[number] for part in parts]
        bars = axes.barh(names, widths, left=left, color=colour, label=kind)
        axes.bar_label(bars, [f"{width:.0f}" if width >= 5 else "" for width in widths], label_type="center")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="share of the run (%)", title="Time of the stages", xlim=(0, 100))
    axes.invert_yaxis()
    if stages:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    else:
        axes.text(0.5, 0.5, "the run has no result", ha="center", transform=axes.transAxes)
