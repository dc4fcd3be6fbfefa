"""``scpl-dist export``: a trained model in a form that needs nothing of this package, one file here for each form.

A format is a function ``write(run_dir, target, checkpoint, depth) -> int``, which puts the model, cut behind `depth`
blocks if that is not None, into a file or folder in one step, and returns the number of its tensors. `SUFFIXES` has how
names of files end; a format that is not in it takes any name. Installed packages add formats as entry points in the
group ``scpl_dist.exports``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scpl_dist.run.registry import Registry

FORMATS = Registry(
    "exports",
    "--format",
    {
        "safetensors": "scpl_dist.commands.export.safetensors:write",
        "onnx": "scpl_dist.commands.export.onnx:write",
        "torch_export": "scpl_dist.commands.export.torch_export:write",
        "hf": "scpl_dist.commands.export.huggingface:write",
    },
)
SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}


def export(
    run_dir: Path,
    target: Path,
    checkpoint: str | None = None,
    kind: str | None = None,
    depth: int | None = None,
) -> int:
    """What `scpl_dist.export` does."""
    if kind is None:
        kind = next((name for name, suffix in SUFFIXES.items() if suffix == target.suffix), None)
    if kind is None:
        known = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
        raise ValueError(f"{target}: end its name in {known}, or say what to write with --format")
    write = FORMATS.find(kind)
    suffix = SUFFIXES.get(kind, target.suffix)
    if target.suffix != suffix:
        raise ValueError(
            f"{target}: --format {kind} writes {suffix}; call the file {target.with_suffix(suffix)}"
        )
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}; make it first")
    number: int = write(run_dir, target, checkpoint, depth)
    return number


@contextmanager
def in_one_step(target: Path) -> Iterator[Path]:
    """A path to write to, in a folder beside the target, and move from there with what lies beside it then."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            yield Path(folder, target.name)
            # What the file refers to first: who finds the file finds all of it.
            for made in sorted(Path(folder).iterdir(), key=lambda path: path.name == target.name):
                os.replace(made, target.parent / made.name)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror or error}") from None
