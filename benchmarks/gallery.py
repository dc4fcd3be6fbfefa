"""The pictures of docs/gallery.md, from runs that are trained for them: ``python -m benchmarks.gallery docs/pictures``.

Takes some minutes on two cores; draw on a machine with nothing else to do, or the stages' shares of time say little.
``--quick`` trains every run for one epoch, to see that all of it works.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import scpl_dist
from benchmarks.timeline import picture
from scpl_dist.commands.report import COLOURS, write
from scpl_dist.commands.timeline import lanes

COMPARED = {
    "scpl": "scpl",
    "bp": "bp",
    "gpipe": "gpipe-4-parts",
    "early_exit": "early_exit",
}  # their runs' folders
TEXTS = ["data.name=docstrings", "model.name=transformer_tiny", "run.method=early_exit", "run.epochs=6"]
LANGUAGE = [
    "task.name=lm",
    "model.name=gpt",
    "model.args={width=96, heads=4}",
    "data.name=text_lm",
    "data.args={length=64, limit=400000}",
    "data.batch_size=16",
    "run.method=early_exit",
    "run.epochs=3",
    "schedule.per=step",
    "schedule.warmup=50",
]
CONFUSION = 'task.metrics=["confusion"]'
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def command(*words: str, settings: list[str]) -> None:
    """Run ``scpl-dist`` with settings of the form section.key=value; what it prints is shown."""
    options = [word for text in settings for word in ("-o", text)]
    subprocess.run([sys.executable, "-m", "scpl_dist", *words, *options], check=True)


def small(file: Path) -> None:
    """Write a drawing of few colours as one with a palette, in place: a third of the bytes."""
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def leaving_early(run: Path, target: Path) -> None:
    """Test accuracy against the blocks that a sample passes, for several thresholds."""
    everything = scpl_dist.evaluate(run)
    points = [
        (found["mean_depth"], found["accuracy"])
        for found in (scpl_dist.evaluate(run, threshold=threshold) for threshold in THRESHOLDS)
    ]
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        *zip(*points, strict=True), color=COLOURS[0], marker="o", markersize=4, label="samples leave early"
    )
    for threshold, point in zip(THRESHOLDS, points, strict=True):
        axes.annotate(str(threshold), point, textcoords="offset points", xytext=(4, -11), fontsize=8)
    axes.axhline(
        everything["accuracy"], color=COLOURS[1], linestyle="--", label="all samples pass all blocks"
    )
    axes.set(xlabel="blocks that a sample passes, mean", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


def photograph(page: Path, target: Path) -> None:
    """What a browser shows of a page; nothing, with a word, where there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{target}: not drawn, because there is no browser: apt-get install chromium")
        return
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--window-size=1100,1500"),
                *(f"--screenshot={target}", page.absolute().as_uri()),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )


def main() -> None:
    """Train, draw, and say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="one epoch of each run")
    given = parser.parse_args()
    given.target.mkdir(parents=True, exist_ok=True)
    short = ["run.epochs=1"] if given.quick else []
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        compared = [
            "--methods",
            ",".join(COMPARED),
            "--micro-batches",
            "4",
            "--run-dir",
            str(runs / "compared"),
        ]
        command("compare", *compared, settings=[CONFUSION, "trace.every=1", *short])
        command("train", "--run-dir", str(runs / "texts"), settings=[*TEXTS, CONFUSION, *short])
        command("train", "--run-dir", str(runs / "language"), settings=[*LANGUAGE, *short])
        drawn = {"methods": runs / "compared" / "accuracy.png"}
        folders = {name: runs / "compared" / f"{run}-seed0" for name, run in COMPARED.items()}
        folders |= {name: runs / name for name in ("texts", "language")}
        for name, run in folders.items():
            page, drawn[name] = write(run)
            if name == "scpl":
                photograph(page, given.target / "page.png")
        for name, file in drawn.items():
            shutil.copyfile(file, given.target / f"{name}.png")
        timelines = {name: lanes(folders[name]) for name in COMPARED}
        picture(timelines, given.target / "timelines.png")
        leaving_early(runs / "texts", given.target / "leaving_early.png")
    for name in (*drawn, "timelines", "leaving_early", "page"):
        file = given.target / f"{name}.png"
        if file.exists():
            small(file)
            print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
