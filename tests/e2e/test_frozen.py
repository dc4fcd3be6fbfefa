"""Frozen blocks: runs of any number of stages equal a plain loop, in which they are in evaluation mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.commands.evaluate import evaluate
from scpl_dist.run.config import load
from scpl_dist.storage.parts import read_part
from tests.e2e.test_exactness import FEW, METHODS, same
from tests.support import in_threads, paced, reference
from tests.support.command import called, scpl_dist
from tests.support.conduct import Running, conduct
from tests.support.conduct import same as equal
from tests.support.run_folder import accuracies, losses

pytestmark = pytest.mark.timeout(600)

LATER = "block=[{index = 1, freeze = true}, {index = [0, 2], freeze_after_epoch = 1}]"
FIRST = "block=[{index = [0, 1], freeze = true}]"
AHEAD = "block=[{index = [0, 1], freeze_after_epoch = 1}, {index = 3, freeze = true}]"
NORMS = ["model.name=resnet_tiny", "model.args.width=4"]  # BatchNorm learns statistics in training mode
RECIPES = {
    "scpl": [LATER],
    "scpl, BatchNorm": [LATER, *NORMS],
    "scpl, last": ["block=[{index = 3, freeze_after_epoch = 1}]"],
    "early_exit, averaged": ["run.method=early_exit", AHEAD, "optimizer.ema=0.5", "optimizer.accumulate=2"],
    "al": [*METHODS["al"], LATER],
    "bp": [*METHODS["bp"], AHEAD, *NORMS],
    "bp, clipped": [*METHODS["bp"], LATER, "optimizer.clip_norm=0.2"],
    "gpipe, recomputation": [*METHODS["gpipe, recomputation"], FIRST, *NORMS],
    "1f1b": [*METHODS["1f1b"], LATER],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pipeline_equals_a_plain_loop(recipe: str) -> None:
    settings = [*FEW, *RECIPES[recipe]]
    wanted = reference.train(load(None, settings))
    for stages in (1, 2, 4):
        found = in_threads.Run(load(None, [*settings, f"pipeline.stages={stages}"])).result
        assert found.losses == wanted.losses, stages
        assert found.accuracy == wanted.accuracy, stages
        same(reference.tensors(found.trainables), wanted)


def test_processes_equal_a_plain_loop_also_from_the_end_of_the_epoch_before_a_block_is_frozen(
    tmp_path: Path,
) -> None:
    settings = [*FEW, LATER]
    wanted = reference.train(load(None, settings))
    conduct = ["checkpoint.every_steps=1", "checkpoint.keep=9", "metrics.port=0"]
    options = [part for text in (*settings, *conduct) for part in ("-o", text)]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    scpl_dist("train", "--run-dir", whole, *options)
    assert losses(whole) == wanted.losses
    assert {block for step, block in wanted.losses if step >= 3} == {3}
    assert read_part(whole / "checkpoints" / "step-3", 0)["optimizers"]
    assert read_part(whole / "checkpoints" / "step-4", 0)["optimizers"] == []
    scpl_dist("train", "--run-dir", rest, "--resume", whole / "checkpoints" / "step-3", *options)
    assert losses(rest) == {place: terms for place, terms in wanted.losses.items() if place[0] >= 3}
    for run in (whole, rest):
        called("export", run, tmp_path / f"{run.name}.safetensors")
        same(load_file(tmp_path / f"{run.name}.safetensors"), wanted)
    assert [found for _, split, found in accuracies(rest) if split == "test"][-1] == wanted.accuracy[-1]
    assert evaluate(whole).accuracy == wanted.accuracy[-1]
    called("report", whole)


def test_replicas_freeze_together(tmp_path: Path) -> None:
    """Whose sums have another order than those of the loop, so they are close to it; what is frozen is the same."""
    settings = [*FEW, AHEAD, *NORMS]
    wanted = reference.train(load(None, [*settings, "optimizer.lr=1e-3"]))
    overrides = [*settings, "optimizer.lr=1e-3", "pipeline.replicas=[2, 1]", "metrics.port=0"]
    scpl_dist("train", "--run-dir", tmp_path / "run", *(part for text in overrides for part in ("-o", text)))
    found = losses(tmp_path / "run")
    assert found.keys() == wanted.losses.keys()
    for place, terms in wanted.losses.items():
        assert found[place] == pytest.approx(terms, rel=1e-2), place
    called("export", tmp_path / "run", tmp_path / "out.safetensors")
    tensors = reference.tensors(wanted.trainables)
    exported = load_file(tmp_path / "out.safetensors")
    assert all(
        torch.equal(exported[name], one) for name, one in tensors.items() if name.startswith("blocks.3.")
    )


def test_the_worker_of_frozen_blocks_takes_over_others(tmp_path: Path) -> None:
    settings = [*paced.settings(tmp_path, 0.02), "run.epochs=120", "checkpoint.best=false"]
    settings.append("block=[{index = [0, 1], freeze_after_epoch = 1}]")
    fast = tmp_path / "fast"
    fast.touch()
    calm = conduct(tmp_path / "calm", *settings, "pipeline.stages=4")
    fast.unlink()
    with Running(tmp_path / "moved", *settings, "pipeline.stages=2", "pipeline.balance=auto") as running:
        running.wait_for_rows("move", 1)
        fast.touch()
        moved = running.end()
    equal(moved, calm)
    assert [(row["from"], row["to"]) for row in moved.rows("move")][:1] == [([2, 2], [3, 1])]
