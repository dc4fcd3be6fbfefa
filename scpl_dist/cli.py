"""The command ``scpl-dist``.

Exit codes: 0 done; 1 failed; 2 usage or configuration; 130 / 143 stopped by SIGINT / SIGTERM with a good checkpoint.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from scpl_dist import __version__
from scpl_dist.commands import checkpoints, runs
from scpl_dist.commands.settings import explained, write_defaults
from scpl_dist.commands.table import show
from scpl_dist.control.keys import create
from scpl_dist.launch import local
from scpl_dist.launch.process import leave as _leave
from scpl_dist.run import config as configuration
from scpl_dist.run.errors import PreflightError
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.resume import begin

_STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, **_STYLE)
keys = typer.Typer(help="CURVE keys of the control plane.", **_STYLE)
app.add_typer(keys, name="keys")
checkpoint_app = typer.Typer(help="Look at the checkpoints of a run.", **_STYLE)
app.add_typer(checkpoint_app, name="checkpoint")

ConfigFile = Annotated[Path | None, Argument(metavar="[CONFIG.toml]", help="Default: the embedded main job.")]
Overrides = Annotated[list[str] | None, Option("-o", metavar="SECTION.KEY=VALUE", help="Override a key.")]
ConfigFileArgument = Annotated[Path, Argument(metavar="CONFIG.toml", help="Configuration.")]
Resume = Annotated[str, Option(metavar="auto|never|PATH", help="Go on from a checkpoint.")]
RunDir = Annotated[Path | None, Option(help="Run folder. Default: runs/<time>-<method>.")]
RunFolderArgument = Annotated[Path, Argument(metavar="RUN_DIR", help="Run folder.")]
CheckpointName = Annotated[str | None, Option("--checkpoint", help="Such as step-200. Default: the newest.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"scpl-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile = None,
    override: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = "never",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, show the plan, start nothing.")
    ] = False,
) -> None:
    """Train on this machine, one process a stage."""
    if resume != "never":
        config = config or _saved_config(run_dir, resume)
    settings = configuration.load(config, override or [])
    if not dry_run:
        _leave(local.train(settings, run_dir, resume)[0])
    from scpl_dist.launch.preflight import preflight

    position = begin(run_dir, resume, settings).manifest.get("position")
    plan = preflight(settings, _without_data, position)
    print(explained(plan.config))
    print(plan.table())


@app.command()
def evaluate(
    run_dir: RunFolderArgument,
    split: Annotated[str, Option(help="train, validation or test")] = "test",
    checkpoint: CheckpointName = None,
    exit_threshold: Annotated[
        float | None,
        Option(help="Let samples leave at the first block that gives a class this probability."),
    ] = None,
    block: Annotated[int | None, Option(help="Take the answer of this block for all samples.")] = None,
) -> None:
    """Accuracy and other metrics of a run's saved weights."""
    from scpl_dist.commands import evaluate

    found = evaluate.evaluate(run_dir, split, checkpoint, exit_threshold, block)
    answers = f"{sum(found.correct)} of {found.total}"
    print(f"{split} accuracy {found.accuracy:.4f} ({answers}) with the weights of {found.checkpoint}")
    for name, value in found.metrics.items():
        if isinstance(value, float) and name != "accuracy":
            print(f"{split} {name} {value:.4f}")
    if exit_threshold is not None or block is not None:
        print(f"mean depth {found.mean_depth:.2f} of {len(found.left)} blocks")
        show(("block", "left", "accuracy"), found.rows())


@app.command()
def export(
    run_dir: RunFolderArgument,
    target: Annotated[Path, Argument(metavar="OUT.safetensors", help="File to write.")],
    checkpoint: CheckpointName = None,
) -> None:
    """Write a run's weights as one plain state dict."""
    from scpl_dist.commands import saved

    print(f"{saved.export(run_dir, target, checkpoint)} tensors in {target}")


@app.command()
def compare(
    config: ConfigFile = None,
    methods: Annotated[str, Option(help="Methods, separated by commas.")] = "scpl,bp,early_exit,gpipe,al",
    override: Overrides = None,
    seeds: Annotated[int, Option(min=1, help="Runs of each method, with seeds counted up.")] = 1,
    micro_batches: Annotated[
        str, Option(help="What GPipe tries in a short run each, separated by commas.")
    ] = "2,4,8",
    run_dir: Annotated[Path | None, Option(help="Folder. Default: runs/<time>-compare.")] = None,
) -> None:
    """Train with several methods on the same data and stages, and write one table and a picture."""
    from scpl_dist.commands import compare
    from scpl_dist.methods import resolve

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        resolve(name)
    try:
        parts = [int(text) for text in micro_batches.split(",")]
    except ValueError:
        raise ValueError(f"--micro-batches {micro_batches!r}: give numbers such as 2,4,8") from None
    folder = run_dir or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-compare")
    found = compare.compare(names, config, override or [], seeds, parts, folder)
    # A column a method: a table with all headings side by side is too wide for most terminals.
    turned = list(zip(compare.COLUMNS.values(), *(row.values() for row in found.rows()), strict=True))
    show(turned[0], turned[1:], left=("method",))
    print(f"{found.note}\ntables and picture: {folder}")
    sys.exit(1 if all(entry.failure for entry in found.entries) else 0)


@app.command()
def report(
    run_dir: RunFolderArgument,
    target: Annotated[Path | None, Argument(metavar="[OUT.png]", help="Default: RUN_DIR/report.png.")] = None,
) -> None:
    """Draw a run: losses, accuracies, how busy the stages were, and the confusion matrix if there is one."""
    from scpl_dist.commands import report

    print(report.report(run_dir, target))


@app.command()
def init(
    target: Annotated[Path, Argument(metavar="[CONFIG.toml]", help="File to write.")] = Path("config.toml"),
) -> None:
    """Write a configuration with every setting, its default and what it means."""
    write_defaults(target)
    print(f"wrote {target}; train with: scpl-dist train {target}")


@app.command("ls")
def list_runs(
    root: Annotated[Path, Argument(metavar="[FOLDER]", help="Folder with run folders in it.")] = Path("runs"),
) -> None:
    """List the runs in a folder, oldest first: what was trained, how well, how long, how it ended."""
    show(runs.HEADINGS, runs.listing(root), left=runs.LEFT)


@app.command()
def plan(config: ConfigFile = None, override: Overrides = None) -> None:
    """Measure each block here, and show how fast how many stages would be, where to cut, and what links carry."""
    from scpl_dist import data
    from scpl_dist.launch.preflight import examine
    from scpl_dist.plan import forecast
    from scpl_dist.worker import costs

    settings = configuration.load(config, override or [])
    source = data.resolve(settings)
    print(forecast.forecast(examine(settings, source), source, costs.measure).text())


@app.command()
def top(
    target: Annotated[
        str, Argument(metavar="RUN_DIR|ADDRESS", help="Run folder, or address of its metrics.")
    ],
    every: Annotated[float, Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Draw the table once.")] = False,
) -> None:
    """Watch a run that goes on elsewhere, from its metrics."""
    from scpl_dist.commands.top import follow

    raise typer.Exit(follow(target, every, once))


@app.command()
def worker(
    config: ConfigFileArgument,
    override: Overrides = None,
    run_dir: Annotated[Path | None, Option(help="Run folder, shared. Default: the coordinator's.")] = None,
    control: Annotated[
        str | None, Option(help="Coordinator. Default: control.host and control.port.")
    ] = None,
    no_coordinator: Annotated[bool, Option("--no-coordinator", help="Rank 0 starts none.")] = False,
    resume: Resume = "never",
) -> None:
    """Be the stage of this rank; started by torchrun. Rank 0 starts the coordinator."""
    # While a worker loads, SIGINT ends it as SIGTERM does: an exit code would look like a failure to the coordinator.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = configuration.load(config, override or [])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a peer's ordinary end is worth no warning
    from scpl_dist.launch import rank

    _leave(rank.main(settings, run_dir, control, not no_coordinator, resume))


@app.command()
def coordinator(
    config: ConfigFileArgument, override: Overrides = None, run_dir: RunDir = None, resume: Resume = "never"
) -> None:
    """Be the coordinator, as a service of its own; the workers are started with --no-coordinator."""
    from scpl_dist.coordinator import service

    settings = configuration.load(config, override or [])
    _leave(service.alone(settings, run_dir, resume))


@app.command()
def doctor(
    config: ConfigFile = None,
    override: Overrides = None,
    folder: Annotated[Path, Option("--run-dir", help="Where runs are written, shared.")] = Path("runs"),
) -> None:
    """Look for what keeps a run from starting on this host; exit code 1 if something does."""
    from scpl_dist.commands.doctor import examine

    findings = list(examine(configuration.load(config, override or []), folder))
    show(("", "check", "finding"), findings, left=("", "check", "finding"))
    raise typer.Exit(int(any(finding.state == "fail" for finding in findings)))


@keys.command("new")
def keys_new(folder: Annotated[Path, Argument(metavar="DIR", help="Folder, made if need be.")]) -> None:
    """Make a pair of keys for the coordinator and one for the workers."""
    create(folder)
    print(f"coordinator: coordinator.key_secret and worker.key of {folder}")
    print(f"each worker: worker.key_secret and coordinator.key of {folder}")
    print("secret files stay readable by their owner only; control.keys names the folder on each host")


@checkpoint_app.command("ls")
def checkpoint_ls(run_dir: RunFolderArgument) -> None:
    """List them, oldest first."""
    show(checkpoints.HEADINGS, checkpoints.listing(run_dir), left=("checkpoint", "written", "called"))


@checkpoint_app.command("verify")
def checkpoint_verify(run_dir: RunFolderArgument) -> None:
    """Compare every file with its manifest; exit code 1 if one differs."""
    raise typer.Exit(checkpoints.check(run_dir))


def _without_data(reason: str) -> None:
    print(f"data not checked, because its files are missing: {reason}", file=sys.stderr)


def _saved_config(run_dir: Path | None, resume: str) -> Path | None:
    """The configuration of the run that goes on, unless another one is given."""
    if resume == "auto" and run_dir is None:
        raise ValueError(
            "--resume auto: say which run goes on with --run-dir DIR, or give --resume a checkpoint"
        )
    folders = [run_dir] if run_dir is not None else []
    if resume != "auto":
        if not Path(resume).is_dir():
            raise ValueError(
                f"--resume {resume}: no such folder: use auto, never, a run folder or a checkpoint"
            )
        folders += [Path(resume), Path(resume).parent.parent]
    return next((file for folder in folders if (file := folder / "config.toml").is_file()), None)


def _hint(words: Sequence[str]) -> None:
    """After a mistake on the command line: what looks like an option may be a key of the configuration."""
    names = [
        word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"
    ]
    for key in itertools.chain.from_iterable(map(configuration.keys_called, names)):
        print(f"scpl-dist: settings are given as -o {key}=VALUE", file=sys.stderr)


def main() -> None:
    """Entry point."""
    try:
        app()
    except SystemExit as end:
        if end.code == 2:
            _hint(sys.argv)
        raise
    except (ValueError, CheckpointError, PreflightError) as error:
        print(f"scpl-dist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
