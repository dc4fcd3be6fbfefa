"""Whatever changes the weights, and when: runs of one and of three stages equal a plain loop with torch's classes."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.commands.evaluate import evaluate
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import load
from scpl_dist.storage.parts import read_part
from tests.e2e.test_exactness import FEW, same
from tests.repository.test_examples_in_documents import CONFIGURATIONS
from tests.support import in_threads, reference
from tests.support.command import called, scpl_dist
from tests.support.run_folder import accuracies, losses

SGD = [
    "optimizer.name=sgd",
    "optimizer.args.momentum=0.9",
    "optimizer.args.nesterov=true",
    "optimizer.lr=0.05",
]
BP, GPIPE = ["run.method=bp"], ["run.method=gpipe", "pipeline.micro_batches=3"]
DECAY = "optimizer.args.weight_decay=0.1"
RECIPES = {
    "adamw": ["optimizer.name=adamw", DECAY, "optimizer.decay_norms=false"],
    "sgd, warm-up": [*SGD, DECAY, "schedule.per=step", "schedule.warmup=2"],
    "rmsprop, al": [
        "optimizer.name=rmsprop",
        "optimizer.args.centered=true",
        "run.method=al",
        "al.autoencoder_lr=2.0",
    ],
    "adagrad": ["optimizer.name=adagrad", "schedule.name=linear"],
    "radam": ["optimizer.name=radam", *GPIPE],
    "clipped block by block": ["optimizer.clip_norm=0.2"],
    "clipped as a whole": [*GPIPE, *SGD, "optimizer.clip_norm=0.2"],
    "clipped by entries": [*BP, *SGD, "optimizer.clip_value=1e-3"],
    "accumulated": [*SGD, "optimizer.accumulate=2"],
    "accumulated, gpipe, clipped": [*GPIPE, "optimizer.accumulate=2", "optimizer.clip_norm=0.2"],
    "averaged": ["optimizer.ema=0.5"],
    "all at once": [*BP, *SGD, "optimizer.accumulate=2", "optimizer.clip_norm=0.2", "optimizer.ema=0.8"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pipeline_equals_a_plain_loop(recipe: str) -> None:
    settings = [*FEW, *RECIPES[recipe]]
    wanted = reference.train(load(None, settings))
    for stages in (1, 3):
        found = in_threads.Run(load(None, [*settings, f"pipeline.stages={stages}"])).result
        assert found.losses == wanted.losses, stages
        assert found.accuracy == wanted.accuracy, stages
        same(reference.tensors(found.trainables), wanted)


SMALL = {
    "sgd.toml": ["model.name=resnet_tiny", "model.args.width=4", *FEW],
    "adamw.toml": [
        "model.name=transformer",
        "model.args={vocabulary = 500, width = 32, hidden = 32, heads = 4, dropout = 0.0}",
        "data.name=docstrings",
        "data.args.length=16",
        "data.batch_size=1024",
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_of_the_documents_equals_a_plain_loop(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(CONFIGURATIONS[name])
    assert len(CONFIGURATIONS[name].splitlines()) <= 15
    settings = [*SMALL[name], "run.epochs=1"]
    wanted = reference.train(load(tmp_path / name, settings))
    for stages in (1, 3):
        found = in_threads.Run(load(tmp_path / name, [*settings, f"pipeline.stages={stages}"])).result
        assert found.losses == wanted.losses, stages
        assert found.accuracy == wanted.accuracy, stages
        same(reference.tensors(found.trainables), wanted)


def test_clipping_changes_a_run(tmp_path: Path) -> None:
    """Or the limits above would be too high to show anything."""
    for key in ("clip_norm=0.2", "clip_value=1e-3"):
        plain, clipped = (
            reference.train(load(None, [*FEW, *BP, *SGD, "run.epochs=1", *more]))
            for more in ([], [f"optimizer.{key}"])
        )
        assert not torch.equal(*(next(iter(run.trainables[0].parameters())) for run in (plain, clipped)))


def test_processes_equal_a_plain_loop_also_from_a_checkpoint_between_two_batches_of_an_update(
    tmp_path: Path,
) -> None:
    """What answers is the average: in the run, of its folder, and when it is exported."""
    settings = [*RECIPES["all at once"], "run.epochs=2", "data.batch_size=256", "schedule.warmup=0.2"]
    wanted = reference.train(load(None, settings))
    conduct = ["pipeline.stages=3", "checkpoint.every_steps=3", "checkpoint.keep=9", "metrics.port=0"]
    options = [part for text in (*settings, *conduct) for part in ("-o", text)]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    scpl_dist("train", "--run-dir", whole, *options)
    assert losses(whole) == wanted.losses
    assert "gradients" in read_part(whole / "checkpoints" / "step-3", 0)
    scpl_dist("train", "--run-dir", rest, "--resume", whole / "checkpoints" / "step-3", *options)
    assert losses(rest) == {place: terms for place, terms in wanted.losses.items() if place[0] >= 3}
    for run in (whole, rest):
        assert [found for _, split, found in accuracies(run) if split == "test"][-1] == wanted.accuracy[-1]
        called("export", run, tmp_path / "out.safetensors")
        exported = load_file(tmp_path / "out.safetensors")
        averages = {block: cast(TrainableBlock, one.module) for block, one in wanted.averages.items()}
        for name, tensor in reference.tensors(averages).items():
            assert torch.equal(exported[name], tensor), name
    assert evaluate(whole).accuracy == wanted.accuracy[-1]
