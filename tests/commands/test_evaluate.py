"""Accuracy of saved weights, at the end and with early exit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scpl_dist import data
from scpl_dist.commands.evaluate import evaluate
from scpl_dist.commands.saved import load as load_saved
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.storage import checkpoints
from scpl_dist.storage.parts import part_name, write_part
from scpl_dist.worker.updater import Updater


def saved(folder: Path, **values: object) -> Path:
    """A run folder with a checkpoint of a model whose blocks have seen a little of the data."""
    config = load(values={"data.augmentation": "none", **values})
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    trainables = plan.trainables(range(4))
    inputs, labels = source.batch("train", 0, torch.arange(128))
    for _ in range(4):
        carry = plan.method.carry(inputs, labels)
        for trainable in trainables.values():
            after = trainable.train()(carry)
            torch.autograd.backward(torch.stack(list(trainable.losses(carry, after, labels).values())).sum())
            torch.optim.Adam(trainable.parameters(), lr=3e-3).step()
            trainable.zero_grad()
            carry = torch.utils._pytree.tree_map(torch.Tensor.detach, after)
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    target = checkpoints.folder_for(folder, 8)
    target.mkdir(parents=True)
    files = [
        write_part(target / part_name(block), Updater(trainable, config).state_dict())
        for block, trainable in trainables.items()
    ]
    position = {"epoch": 0, "step": 8, "batch": 0}
    checkpoints.commit(target, {"step": 8, "position": position, "files": files}, keep=1)
    return folder


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("early") / "run", **{"run.method": "early_exit"})


def test_nobody_leaves_before_the_end_at_an_impossible_threshold(early: Path) -> None:
    found = evaluate(early, threshold=1.1)
    assert found.left == [0, 0, 0, found.total]
    assert found.mean_depth == 4
    assert found.accuracy == evaluate(early).accuracy


def test_all_leave_at_the_first_block_at_a_tiny_threshold(early: Path) -> None:
    found = evaluate(early, threshold=1e-6)
    assert found.left == [found.total, 0, 0, 0]
    assert found.mean_depth == 1
    assert found == evaluate(early, block=0)


def test_samples_leave_at_the_first_block_that_is_sure_and_the_table_says_so(early: Path) -> None:
    plan, source, trainables = load_saved(early)
    carry, labels = source.batch("test", 0, torch.arange(source.sizes["test"]))
    with torch.no_grad():
        first = plan.method.scores(trainables, 0, trainables[0](carry))
    assert first is not None
    sure = plan.method.probabilities(first).max(1).values.sort().values
    middle = sure[len(sure) // 4 : -len(sure) // 4]
    gap = int(middle.diff().argmax())  # between two samples that no rounding brings together
    threshold = float(middle[gap : gap + 2].mean())
    found = evaluate(early, threshold=threshold)
    depth, right = torch.full((len(labels),), -1), torch.zeros(len(labels), dtype=torch.bool)
    with torch.no_grad():
        for block, trainable in trainables.items():
            carry = trainable(carry)
            scores = plan.method.scores(trainables, block, carry)
            assert scores is not None
            sure, answer = plan.method.probabilities(scores).max(1)
            leaving = (depth < 0) & ((sure >= threshold) | (block == 3))
            depth[leaving], right[leaving] = block, (answer == labels)[leaving]
    assert 1 < found.mean_depth < 4
    assert found.left == [int((depth == block).sum()) for block in range(4)]
    assert found.correct == [int(right[depth == block].sum()) for block in range(4)]
    assert found.rows()[0][:2] == ["0", f"{found.left[0] / found.total:.1%}"]


def test_associated_learning_has_a_shortcut_from_every_block(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", **{"run.method": "al"})
    for block in range(4):
        found = evaluate(run, block=block)
        assert found.left[block] == found.total == 355
    assert evaluate(run, block=3).accuracy == evaluate(run).accuracy


def test_blocks_without_a_classifier_say_what_is_possible(tmp_path: Path) -> None:
    run = saved(tmp_path / "plain")
    for choice in ({"threshold": 0.9}, {"block": 1}):
        with pytest.raises(
            ValueError, match=r"no block before the last .* train with loss.local_predictors = true"
        ):
            evaluate(run, **choice)
    with pytest.raises(ValueError, match=r"--block 4: the model has the blocks 0 to 3"):
        evaluate(run, block=4)
    watched = saved(tmp_path / "watched", **{"loss.local_predictors": True})
    assert evaluate(watched, threshold=1e-6).mean_depth == 1
