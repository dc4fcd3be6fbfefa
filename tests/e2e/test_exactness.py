"""The claim of the project: the number of processes does not change a bit of the result, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from scpl_dist.commands.evaluate import evaluate
from scpl_dist.run.config import load
from tests.support import in_threads, reference
from tests.support.command import called, scpl_dist
from tests.support.reference import Reference
from tests.support.run_folder import accuracies, losses

Expected = Callable[..., Reference]
METHODS = {
    "scpl": [],
    "bp": ["run.method=bp"],
    "gpipe": ["run.method=gpipe", "pipeline.micro_batches=3"],
    "gpipe, recomputation": ["run.method=gpipe", "pipeline.micro_batches=3", "pipeline.recompute=true"],
    "early_exit": ["run.method=early_exit"],
    "al": ["run.method=al", "al.autoencoder_lr=2.0"],
    "scpl, parts": ["pipeline.micro_batches=3", f"model.name={__name__}:plain", "optimizer.accumulate=2"],
    "1f1b": ["run.method=gpipe", "pipeline.micro_batches=3", "pipeline.schedule=1f1b"],
}


def pictures(root: str) -> list[TensorDataset]:
    """So few that all methods can learn from them in a moment; the last batch is smaller than the others."""
    generator = torch.Generator().manual_seed(0)
    return [
        TensorDataset(
            torch.randn(size, 1, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator)
        )
        for size in (110, 20, 50)
    ]


def plain(classes: int) -> list[nn.Module]:
    """Four blocks that know nothing of the other samples of a batch."""
    widths = [(1, 8), (8, 8), (8, 16), (16, 16)]
    return [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(2, b), nn.ReLU(inplace=True)) for a, b in widths
    ]


FEW = [f"data.name={__name__}:pictures", "data.augmentation=none", "data.batch_size=48", "run.epochs=2"]


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_of_threads_equals_a_plain_loop(method: str) -> None:
    wanted = reference.train(load(None, [*FEW, *METHODS[method]]))
    for stages in (1, 2, 3, 4):
        found = in_threads.Run(load(None, [*FEW, *METHODS[method], f"pipeline.stages={stages}"])).result
        assert found.losses == wanted.losses, stages
        assert found.accuracy == wanted.accuracy, stages
        same(reference.tensors(found.trainables), wanted)


MAIN_JOB = ["run.epochs=1", "data.batch_size=256", "metrics.port=0"]
STRONG = ["run.epochs=2", "data.augmentation=strong"]


@pytest.fixture(scope="module")
def expected() -> Expected:
    """What a method comes to as a plain loop."""
    return cache(lambda *settings: reference.train(load(None, list(settings))))


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("scpl", 1),
        ("scpl", 2),
        ("scpl", 4),
        ("scpl, parts", 2),
        ("bp", 2),
        ("al", 3),
        ("gpipe", 4),
        ("1f1b", 4),
    ],
)
def test_processes_equal_a_plain_loop(method: str, stages: int, expected: Expected, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", [*MAIN_JOB, *METHODS[method], *(STRONG if method == "scpl" else [])]
    wanted = expected(*settings)
    overrides = [part for text in (*settings, f"pipeline.stages={stages}") for part in ("-o", text)]
    scpl_dist("train", "--run-dir", run, *overrides)
    assert losses(run) == wanted.losses
    assert [accuracy for _, split, accuracy in accuracies(run) if split == "test"] == wanted.accuracy
    called("export", run, tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors"), wanted)


def test_processes_and_an_evaluation_come_to_the_same_in_bfloat16_and_channels_last(tmp_path: Path) -> None:
    settings = [*FEW, "runtime.precision=bfloat16", "runtime.memory_format=channels_last"]
    wanted = in_threads.Run(load(None, [*settings, "pipeline.stages=1"])).result
    overrides = [part for text in (*settings, "metrics.port=0", "pipeline.stages=2") for part in ("-o", text)]
    scpl_dist("train", "--run-dir", tmp_path / "run", *overrides)
    assert losses(tmp_path / "run") == wanted.losses
    found = [accuracy for _, split, accuracy in accuracies(tmp_path / "run") if split == "test"]
    assert found == wanted.accuracy
    assert evaluate(tmp_path / "run").accuracy == found[-1]
    called("export", tmp_path / "run", tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors"), wanted)


def same(found: dict[str, Tensor], wanted: Reference) -> None:
    """Weights, with ``==``."""
    tensors = reference.tensors(wanted.trainables)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
