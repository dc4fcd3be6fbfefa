"""The picture of the README: what two stages do in the same time with scpl, gpipe and bp, from traces of real runs.

    python -m benchmarks.timeline docs/pictures/timeline.png

Trains each method for a few epochs with ``trace.every = 1`` and draws equal times of pure training, of each the one in
which it got furthest: on a machine that does other things too, where it was disturbed least. Where there is no bar, a
stage waits.
"""

from __future__ import annotations

import argparse
import bisect
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scpl_dist.commands.timeline import Lane, arrows, lanes
from scpl_dist.run.phases import BLAMELESS

METHODS = {
    "scpl": ["pipeline.micro_batches=1"],
    "gpipe, 4 micro-batches": ["run.method=gpipe", "pipeline.micro_batches=4"],
    "bp": ["run.method=bp"],
}
MODEL = ["pipeline.stages=2", "data.batch_size=64", "run.epochs=6", "metrics.port=0", "trace.every=1"]
COLOURS = {
    "forward": "#0072B2",
    "loss": "#56B4E9",
    "backward": "#D55E00",
    "optimizer": "#009E73",
    "everything else": "#8D97A1",
}
NAMES = {"optimizer": "update", "everything else": "data, send"}
STEPS = 4  # of the slowest, in the picture


def train(settings: Sequence[str], run: Path) -> list[Lane]:
    """What both stages of a run have recorded."""
    command = [sys.executable, "-m", "scpl_dist", "train", "--run-dir", str(run)]
    command += [word for text in [*MODEL, *settings] for word in ("-o", text)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return lanes(run)


def begins(lane: Lane) -> list[tuple[int, float]]:
    """Item and time of the first forward pass of each step of a stage."""
    found: dict[int, float] = {}
    for span in lane.recording.spans:
        if span.phase == "forward":
            found.setdefault(span.sequence, span.begin)
    return list(found.items())


def fastest(lane: Lane) -> float:
    """Seconds of `STEPS` steps in a row that nothing else came between, at their best."""
    found = begins(lane)
    return min(
        later - begin
        for (item, begin), (last, later) in zip(found, found[STEPS:], strict=False)
        if last - item == STEPS
    )


def densest(found: Sequence[Lane], seconds: float) -> tuple[float, float]:
    """Begin of so many seconds of pure training in which stage 0 gets furthest, and how many steps it gets."""
    others = [
        (span.begin, span.end)
        for lane in found
        for span in lane.recording.spans
        if span.phase in ("evaluate", "checkpoint")
    ]
    steps = [begin for _, begin in begins(found[0])]

    def got(first: int) -> float:
        end = steps[first] + seconds
        if steps[-1] < end or any(a < end and b > steps[first] for a, b in others):
            return 0.0
        whole = bisect.bisect(steps, end) - 1
        return whole - first + (end - steps[whole]) / (steps[whole + 1] - steps[whole])

    first = max(range(len(steps)), key=got)
    return steps[first], got(first)


def draw(axes: Axes, name: str, found: Sequence[Lane], begin: float, seconds: float) -> None:
    """A panel: so many seconds of all stages."""
    for place, lane in enumerate(found):
        for phase, colour in COLOURS.items():
            bars = [
                (1000 * (span.begin - begin), 1000 * (span.end - span.begin))
                for span in lane.recording.spans
                if span.end > begin and span.begin < begin + seconds and span.phase not in BLAMELESS
                if span.phase == phase or (phase == "everything else" and span.phase not in COLOURS)
            ]
            axes.broken_barh(bars, (place - 0.34, 0.68), facecolors=colour, edgecolor="white", linewidth=0.3)
    for arrow in arrows(found):
        if begin < arrow.sent and arrow.taken < begin + seconds:
            down = 1 if arrow.target > arrow.source else -1
            end = (1000 * (arrow.taken - begin), arrow.target - 0.36 * down)
            start = (1000 * (arrow.sent - begin), arrow.source + 0.36 * down)
            style = {"arrowstyle": "->", "color": "#444c55", "linewidth": 0.8}
            axes.annotate("", xy=end, xytext=start, arrowprops=style)
    busy = [
        sum(
            max(0.0, min(span.end, begin + seconds) - max(span.begin, begin))
            for span in lane.recording.spans
            if span.phase not in BLAMELESS
        )
        / seconds
        for lane in found
    ]
    axes.set_yticks(range(len(found)), [f"stage {lane.label}" for lane in found])
    axes.set(xlim=(0, 1000 * seconds), ylim=(len(found) - 0.5, -0.5))
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    shares = " and ".join(f"{100 * share:.0f} %" for share in busy)
    axes.set_title(f"{name}: busy {shares} of the time", loc="left", fontsize=10)


def picture(found: Mapping[str, Sequence[Lane]], target: Path) -> None:
    """Draw a panel for each run, and say how far each came in the same time."""
    seconds = max(fastest(of[0]) for of in found.values())
    figure = Figure(figsize=(10, 0.4 + 1.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True)
    for axes, (name, of) in zip(panels, found.items(), strict=True):
        begin, steps = densest(of, seconds)
        draw(axes, name, of, begin, seconds)
        print(f"{name}: {steps:.1f} steps in {1000 * seconds:.0f} ms")
    panels[-1].set_xlabel("milliseconds")
    handles = [Patch(color=colour, label=NAMES.get(name, name)) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def main() -> None:
    """Train, draw, and say how far each came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: train(settings, Path(folder, str(number)))
            for number, (name, settings) in enumerate(METHODS.items())
        }
    picture(found, target)


if __name__ == "__main__":
    main()
