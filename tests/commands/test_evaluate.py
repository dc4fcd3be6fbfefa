"""Accuracy of saved weights, at the end and with early exit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_dist.commands import saved as saved_run
from scpl_dist.commands.evaluate import evaluate
from tests.support.saved_runs import saved


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("early") / "run", **{"run.method": "early_exit"})


def test_nobody_leaves_before_the_end_at_the_highest_threshold(early: Path) -> None:
    found = evaluate(early, threshold=1.0)
    assert found.left == [0, 0, 0, found.total]
    assert found.mean_depth == 4
    assert found.accuracy == evaluate(early).accuracy


def test_all_leave_at_the_first_block_at_a_tiny_threshold(early: Path) -> None:
    found = evaluate(early, threshold=1e-6)
    assert found.left == [found.total, 0, 0, 0]
    assert found.mean_depth == 1
    assert found == evaluate(early, block=0)


def test_samples_leave_at_the_first_block_that_is_sure_and_the_table_says_so(early: Path) -> None:
    there = saved_run.find(early, with_data=True)
    plan, source, trainables = there.plan, there.source, there.blocks()
    assert source is not None
    carry, labels = source.batch("test", 0, torch.arange(source.sizes["test"]))
    with torch.no_grad():
        first = plan.method.scores(trainables, 0, trainables[0](carry))
    assert first is not None
    sure = plan.method.probabilities(first).max(1).values.sort().values
    middle = sure[len(sure) // 4 : -len(sure) // 4]
    gap = int(middle.diff().argmax())  # between two samples that no rounding brings together
    threshold = float(middle[gap : gap + 2].mean())
    found = evaluate(early, threshold=threshold, batch_size=len(labels))
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


@pytest.mark.parametrize("threshold", [0.0, 3.0, float("nan")])
def test_a_threshold_is_a_probability(early: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"--exit-threshold {threshold}: give the probability"):
        evaluate(early, threshold=threshold)


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


@pytest.mark.parametrize("method", ["early_exit", "al"])
def test_one_block_in_memory_at_a_time_gives_the_same(tmp_path: Path, method: str) -> None:
    run = saved(tmp_path / "run", **{"run.method": method})
    usual, small = evaluate(run, threshold=0.4), evaluate(run, threshold=0.4, low_memory=True)
    assert small.left == usual.left
    assert small.correct == usual.correct
    at_once = evaluate(run, batch_size=500)  # whose sums may differ in the last digit
    assert at_once.accuracy == pytest.approx(evaluate(run).accuracy, abs=1 / 355)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "--device tpu: unknown; use auto, cpu, cuda"),
        ({"device": "cuda:9"}, r"--device cuda:9: torch sees \d GPUs here; use auto or cpu"),
        ({"batch_size": 0}, "--batch-size 0: give the number of samples in a batch, at least 1"),
    ],
)
def test_a_place_or_a_batch_that_cannot_be_is_refused(
    early: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(early, **options)
