"""Trains neural networks whose blocks learn from losses of their own, and uses them.

Exit codes: 0 done; 1 failed; 2 usage or configuration; 130 / 143 stopped by SIGINT / SIGTERM with a good checkpoint.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from scpl_dist import __version__
from scpl_dist.commands import checkpoints, completion, runs
from scpl_dist.commands.settings import explained, write_defaults
from scpl_dist.commands.table import show
from scpl_dist.control.keys import create
from scpl_dist.launch import local
from scpl_dist.launch.process import leave as _leave
from scpl_dist.run import config as configuration
from scpl_dist.run.errors import PreflightError
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.resume import begin

# Headings of the help, in their order.
TRAIN, LOOK, USE, CLUSTERS = "Train", "Look", "Use the result", "Clusters"


class _Grouped(TyperGroup):
    """Its help has the commands under their headings, each with a whole sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading in (TRAIN, LOOK, USE, CLUSTERS):
            commands = {
                name: command
                for name, command in self.commands.items()
                if getattr(command, "rich_help_panel", None) == heading
            }
            with formatter.section(heading):
                formatter.write_dl(
                    [(name, command.get_short_help_str(200)) for name, command in commands.items()]
                )


_STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(cls=_Grouped, pretty_exceptions_enable=False, help=__doc__, **_STYLE)
keys = typer.Typer(add_completion=False, **_STYLE)
checkpoint_app = typer.Typer(add_completion=False, **_STYLE)


def _command(heading: str, example: str, name: str | None = None) -> Callable[[Callable[..., None]], Any]:
    return app.command(name, rich_help_panel=heading, epilog=f"Example: {example}")


ConfigFile = Annotated[Path | None, Argument(metavar="[CONFIG.toml]", help="Default: the embedded main job.")]
Overrides = Annotated[
    list[str] | None,
    Option("-o", metavar="SECTION.KEY=VALUE", autocompletion=completion.keys, help="Override a key."),
]
ConfigFileArgument = Annotated[Path, Argument(metavar="CONFIG.toml", help="Configuration.")]
Resume = Annotated[str, Option(metavar="auto|never|PATH", help="Go on from a checkpoint.")]
RunDir = Annotated[
    Path | None,
    Option(
        autocompletion=completion.run_folders,
        help="Run folder. Default: runs/<time>-<run.name>, or the method in place of the name.",
    ),
]
RunFolderArgument = Annotated[
    Path, Argument(metavar="RUN_DIR", autocompletion=completion.run_folders, help="Run folder.")
]
CheckpointName = Annotated[
    str | None, Option("--checkpoint", help="Such as step-200, best, or a path. Default: the newest.")
]
ExitThreshold = Annotated[
    float | None,
    Option(help="Let samples leave at the first block that gives a class this probability."),
]
Depth = Annotated[
    int | None, Option(help="Cut the model behind so many blocks, a number: 1 keeps block 0 alone.")
]
Device = Annotated[str, Option(help="auto, cpu, cuda, or cuda:1 for the second GPU.")]
BatchSize = Annotated[int | None, Option(help="Samples computed at once. Default: that of the training.")]
LowMemory = Annotated[bool, Option("--low-memory", help="Hold the weights of one block at a time.")]


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


@_command(TRAIN, "scpl-dist train -o run.epochs=5 -o pipeline.stages=4")
def train(
    config: ConfigFile = None,
    override: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = "never",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, show the plan, start nothing.")
    ] = False,
    on: Annotated[Literal["here", "ray"], Option(help="This machine, or a Ray cluster.")] = "here",
) -> None:
    """Train on this machine, one process a stage, or on a Ray cluster."""
    if resume != "never":
        config = config or _saved_config(run_dir, resume)
    settings = configuration.load(config, override or [])
    if not dry_run and on == "ray":
        from scpl_dist.launch import ray

        _leave(ray.train(settings, run_dir, resume)[0])
    if not dry_run:
        _leave(local.train(settings, run_dir, resume)[0])
    from scpl_dist.launch.preflight import preflight

    position = begin(run_dir, resume, settings).manifest.get("position")
    plan = preflight(settings, _without_data, position)
    print(explained(plan.config))
    print(plan.table())


@_command(USE, "scpl-dist evaluate runs/latest --checkpoint best")
def evaluate(
    run_dir: RunFolderArgument,
    split: Annotated[str, Option(help="train, validation or test")] = "test",
    checkpoint: CheckpointName = None,
    exit_threshold: ExitThreshold = None,
    block: Annotated[
        int | None, Option(help="Take the answer of this block for all samples; they count from 0.")
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    low_memory: LowMemory = False,
) -> None:
    """Accuracy and other metrics of a run's saved weights."""
    from scpl_dist.commands import evaluate

    found = evaluate.evaluate(
        run_dir, split, checkpoint, exit_threshold, block, device, batch_size, low_memory
    )
    answers = f"{sum(found.correct)} of {found.total}"
    print(f"{split} accuracy {found.accuracy:.4f} ({answers}) with the weights of {found.checkpoint}")
    for name, value in found.metrics.items():
        if isinstance(value, float) and name != "accuracy":
            print(f"{split} {name} {value:.4f}")
    if exit_threshold is not None or block is not None:
        print(f"mean depth {found.mean_depth:.2f} of {len(found.left)} blocks")
        show(("block", "left", "accuracy"), found.rows())


@_command(USE, "scpl-dist predict runs/latest photos/ -o classes.csv")
def predict(
    run_dir: RunFolderArgument,
    source: Annotated[
        Path,
        Argument(
            metavar="INPUT", help="Image or folder of images; table or lines of text, - for standard input."
        ),
    ],
    target: Annotated[
        Path | None, Option("-o", metavar="OUT.csv|jsonl", help="Default: CSV on standard output.")
    ] = None,
    checkpoint: CheckpointName = None,
    exit_threshold: ExitThreshold = None,
    depth: Depth = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    probabilities: Annotated[bool, Option("--probabilities", help="Write those of all classes.")] = False,
    low_memory: LowMemory = False,
) -> None:
    """Class, probability and block of answer for new inputs."""
    from scpl_dist.commands.predict import predict

    count = predict(
        run_dir,
        source,
        target,
        checkpoint,
        exit_threshold,
        depth,
        device,
        batch_size,
        probabilities,
        low_memory,
    )
    if target is not None:
        print(f"{count} predictions in {target}")


@_command(USE, "scpl-dist export runs/latest model.onnx")
def export(
    run_dir: RunFolderArgument,
    target: Annotated[Path, Argument(metavar="OUT", help="File to write; how it ends says the format.")],
    checkpoint: CheckpointName = None,
    kind: Annotated[
        str | None,
        Option("--format", metavar="safetensors|onnx|torch_export|hf", help="Default: as OUT ends."),
    ] = None,
    depth: Depth = None,
) -> None:
    """Write a run's weights as one plain state dict, its model as a graph, or a folder for transformers."""
    from scpl_dist.commands.export import export

    print(f"{export(run_dir, target, checkpoint, kind, depth)} tensors in {target}")


@_command(USE, "scpl-dist generate runs/latest --prompt 'def '")
def generate(
    run_dir: RunFolderArgument,
    prompt: Annotated[str, Option(help="Text to go on with.")],
    tokens: Annotated[int, Option(help="Most tokens to add.")] = 200,
    temperature: Annotated[float, Option(help="Above 1 bolder, below 1 safer, 0 takes the likeliest.")] = 1.0,
    top_k: Annotated[int | None, Option(help="Draw among so many of the likeliest tokens.")] = None,
    seed: Annotated[int, Option(help="Another seed, another text.")] = 0,
    exit_threshold: Annotated[
        float | None,
        Option(help="Draw a token at the first block that gives one this probability."),
    ] = None,
    checkpoint: CheckpointName = None,
) -> None:
    """Let a language model that a run has saved go on with a text."""
    from scpl_dist.commands.generate import Generation

    made = Generation(run_dir, prompt, tokens, temperature, top_k, seed, exit_threshold, checkpoint)
    print(prompt, end="", flush=True)
    for piece in made:
        print(piece, end="", flush=True)
    print()
    if exit_threshold is not None:
        print(f"mean depth {made.mean_depth:.2f} of {made.blocks} blocks", file=sys.stderr)


@_command(TRAIN, "scpl-dist compare --methods scpl,bp --seeds 3 -o run.epochs=5")
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
    print(f"{found.note}\ntables and picture: {folder}; as one page: scpl-dist report {folder}")
    sys.exit(1 if all(entry.failure for entry in found.entries) else 0)


@_command(LOOK, "scpl-dist report runs/latest")
def report(
    run_dir: RunFolderArgument,
    target: Annotated[
        Path | None,
        Argument(metavar="[OUT.html|OUT.png]", help="Default: report.html and report.png in RUN_DIR."),
    ] = None,
) -> None:
    """Show a run, or a comparison: a page for a browser with everything, and a picture."""
    from scpl_dist.commands import report

    for path in report.write(run_dir, target):
        print(path)


@_command(LOOK, "scpl-dist trace runs/latest -o trace.json.gz")
def trace(
    run_dir: RunFolderArgument,
    target: Annotated[
        Path | None, Option("-o", metavar="OUT.json.gz", help="Default: RUN_DIR/trace.json.gz.")
    ] = None,
) -> None:
    """Write what all stages did when, as recorded with trace.every, for ui.perfetto.dev or chrome://tracing."""
    from scpl_dist.commands import trace

    path, text = trace.write(run_dir, target)
    print(f"{path}: {text}")


@_command(TRAIN, "scpl-dist init config.toml")
def init(
    target: Annotated[Path, Argument(metavar="[CONFIG.toml]", help="File to write.")] = Path("config.toml"),
) -> None:
    """Write a configuration with every setting, its default and what it means."""
    write_defaults(target)
    print(f"wrote {target}; train with: scpl-dist train {target}")


@_command(LOOK, "scpl-dist ls runs", "ls")
def list_runs(
    root: Annotated[Path, Argument(metavar="[FOLDER]", help="Folder with run folders in it.")] = Path("runs"),
) -> None:
    """List the runs in a folder, oldest first: what was trained, how well, how long, how it ended."""
    found = runs.listing(root)
    if not found:
        print(f"no runs in {root}; train one with: scpl-dist train")
        return
    show(runs.HEADINGS, found, left=runs.LEFT)


@_command(TRAIN, "scpl-dist plan config.toml")
def plan(config: ConfigFile = None, override: Overrides = None) -> None:
    """Measure each block here, and show how fast how many stages would be, where to cut, and what links carry."""
    from scpl_dist import data
    from scpl_dist.launch.preflight import examine
    from scpl_dist.plan import forecast
    from scpl_dist.worker import costs

    settings = configuration.load(config, override or [])
    source = data.resolve(settings)
    print(forecast.forecast(examine(settings, source), source, costs.measure).text())


@_command(LOOK, "scpl-dist top runs/latest")
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


@_command(CLUSTERS, "torchrun --nproc-per-node 2 -m scpl_dist worker config.toml")
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


@_command(CLUSTERS, "scpl-dist join /shared/runs/elastic")
def join(run_dir: RunFolderArgument) -> None:
    """Be one more worker of a run that may have more stages (pipeline.elastic), from any host that has its folder."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from scpl_dist.launch import rank

    _leave(rank.join(run_dir))


@_command(CLUSTERS, "scpl-dist drain /shared/runs/elastic --stage 1")
def drain(
    run_dir: RunFolderArgument,
    stage: Annotated[int, Option(min=0, help="Stage that it holds now.")],
    replica: Annotated[int, Option(min=0, help="Which one, where the stage has several workers.")] = 0,
) -> None:
    """Take a worker out of a run: after a checkpoint the others share its blocks (pipeline.elastic)."""
    from scpl_dist.commands.drain import drain as ask

    ask(run_dir, stage, replica)
    print(f"stage {stage} leaves after the next checkpoint; the others go on")


@_command(CLUSTERS, "scpl-dist coordinator config.toml --run-dir /shared/run")
def coordinator(
    config: ConfigFileArgument, override: Overrides = None, run_dir: RunDir = None, resume: Resume = "never"
) -> None:
    """Be the coordinator, as a service of its own; the workers are started with --no-coordinator."""
    from scpl_dist.coordinator import service

    settings = configuration.load(config, override or [])
    _leave(service.alone(settings, run_dir, resume))


@_command(CLUSTERS, "scpl-dist doctor config.toml")
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


@keys.command("new", epilog="Example: scpl-dist keys new keys")
def keys_new(folder: Annotated[Path, Argument(metavar="DIR", help="Folder, made if need be.")]) -> None:
    """Make a pair of keys for the coordinator and one for the workers."""
    create(folder)
    print(f"coordinator: coordinator.key_secret and worker.key of {folder}")
    print(f"each worker: worker.key_secret and coordinator.key of {folder}")
    print("secret files stay readable by their owner only; control.keys names the folder on each host")


@checkpoint_app.command("ls", epilog="Example: scpl-dist checkpoint ls runs/latest")
def checkpoint_ls(run_dir: RunFolderArgument) -> None:
    """List them, oldest first."""
    show(checkpoints.HEADINGS, checkpoints.listing(run_dir), left=("checkpoint", "written", "called"))


@checkpoint_app.command("verify", epilog="Example: scpl-dist checkpoint verify runs/latest")
def checkpoint_verify(run_dir: RunFolderArgument) -> None:
    """Compare every file with its manifest; exit code 1 if one differs."""
    raise typer.Exit(checkpoints.check(run_dir))


# After all others: the last ones of their headings.
app.add_typer(
    checkpoint_app,
    name="checkpoint",
    help="List the checkpoints of a run, or compare every byte with what was written.",
    epilog="Example: scpl-dist checkpoint ls runs/latest",
    rich_help_panel=LOOK,
)
app.add_typer(
    keys,
    name="keys",
    help="CURVE keys of a control plane that leaves this machine.",
    epilog="Example: scpl-dist keys new keys",
    rich_help_panel=CLUSTERS,
)


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
