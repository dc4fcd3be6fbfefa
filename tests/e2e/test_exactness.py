"""The claim of the project: the number of processes does not change a bit of the result, whatever the method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.commands.export import export
from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import scpl_dist

SETTINGS = ["run.epochs=1", "data.batch_size=256", "metrics.port=0"]
METHODS = {
    "scpl": ["run.epochs=2", "data.augmentation=strong"],
    "bp": ["run.method=bp"],
    "gpipe": ["run.method=gpipe", "pipeline.micro_batches=3"],
    "gpipe, recomputation": ["run.method=gpipe", "pipeline.micro_batches=3", "pipeline.recompute=true"],
    "early_exit": ["run.method=early_exit"],
    "al": ["run.method=al", "al.autoencoder_lr=2.0"],
    "1f1b": ["run.method=gpipe", "pipeline.micro_batches=3", "pipeline.schedule=1f1b"],
}


@pytest.fixture(scope="module")
def expected() -> dict[str, reference.Reference]:
    return {}


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_scpl_equals_a_plain_loop(
    stages: int, expected: dict[str, reference.Reference], tmp_path: Path
) -> None:
    check("scpl", stages, expected, tmp_path)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("method", ["bp", "gpipe", "early_exit", "al"])
def test_other_methods_equal_a_plain_loop(
    method: str, stages: int, expected: dict[str, reference.Reference], tmp_path: Path
) -> None:
    check(method, stages, expected, tmp_path)


@pytest.mark.parametrize("method", ["gpipe, recomputation", "1f1b"])
def test_other_schedules_equal_a_plain_loop(
    method: str, expected: dict[str, reference.Reference], tmp_path: Path
) -> None:
    check(method, 4, expected, tmp_path)


def check(method: str, stages: int, expected: dict[str, reference.Reference], folder: Path) -> None:
    """Losses of every step, accuracies and weights of a run are those of the plain loop, bit for bit."""
    settings = [*SETTINGS, *METHODS[method]]
    if method not in expected:
        expected[method] = reference.train(load(None, settings))
    wanted = expected[method]
    run = folder / "run"
    overrides = [part for text in (*settings, f"pipeline.stages={stages}") for part in ("-o", text)]
    scpl_dist("train", "--run-dir", run, *overrides)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {(row["step"], row["block"]): row["terms"] for row in rows if row["event"] == "train"}
    assert losses == wanted.losses
    accuracy = [row["accuracy"] for row in rows if row["event"] == "eval" and row["split"] == "test"]
    assert accuracy == wanted.accuracy

    if method == "scpl":
        scpl_dist("export", run, folder / "out.safetensors")
    else:  # the same without another process to wait for
        export(run, folder / "out.safetensors")
    exported = load_file(folder / "out.safetensors")
    tensors = reference.tensors(wanted.trainables)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(exported[name], tensor), name
