"""Language models: any number of stages comes to the same, and what a run has saved goes on with a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scpl_dist import data
from scpl_dist.commands.evaluate import evaluate
from scpl_dist.commands.generate import Generation
from scpl_dist.data.source import DataSource, Split
from scpl_dist.methods.task import IGNORED
from scpl_dist.run.config import load
from tests.support import in_threads, reference
from tests.support.command import called, scpl_dist
from tests.support.run_folder import losses

METHODS = {
    "scpl": ["run.method=scpl"],
    "early_exit": ["run.method=early_exit"],
    "bp": ["run.method=bp"],
    "gpipe": ["run.method=gpipe", "pipeline.micro_batches=3"],
    "scpl, parts": ["pipeline.micro_batches=3"],
}
SMALL = [
    "task.name=lm",
    "run.watch=perplexity",
    "data.name=text_lm",
    "data.args={length=16, limit=12000}",
    "model.name=gpt",
    "model.args={width=16, layers=4, heads=2}",
    "data.batch_size=48",
    "run.epochs=1",
    "metrics.port=0",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder "data"


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_of_threads_equals_a_plain_loop(method: str) -> None:
    wanted = reference.train(load(None, [*SMALL, *METHODS[method]]))
    for stages in (1, 2):
        found = in_threads.Run(load(None, [*SMALL, *METHODS[method], f"pipeline.stages={stages}"])).result
        assert found.losses == wanted.losses, stages
        assert found.accuracy == wanted.accuracy, stages
        for name, tensor in reference.tensors(found.trainables).items():
            torch.testing.assert_close(tensor, reference.tensors(wanted.trainables)[name], rtol=0, atol=0)
        [metrics] = found.metrics
        assert (
            1 < metrics["perplexity"] == pytest.approx(float(torch.tensor(metrics["loss"]).exp()), rel=1e-4)
        )


class Gaps(DataSource):
    """Texts of which the second half of a batch has one token to guess each."""

    classes = 5
    sizes = {"train": 8, "validation": 4, "test": 4}  # noqa: RUF012

    def batch(self, split: Split, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs = (indices[:, None] * 3 + torch.arange(6)) % self.classes
        labels = (inputs + 1) % self.classes
        labels[indices >= 4, 1:] = IGNORED
        return inputs, labels


@pytest.mark.parametrize("method", ["gpipe", "early_exit"])
def test_parts_of_a_batch_count_by_their_tokens(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "resolve", lambda config: Gaps())
    settings = [*SMALL, "data.batch_size=8", "optimizer.name=sgd", f"run.method={method}"]
    whole = in_threads.Run(load(None, settings)).result
    parts = in_threads.Run(load(None, [*settings, "pipeline.micro_batches=3"])).result
    for place, terms in whole.losses.items():
        assert parts.losses[place] == pytest.approx(terms, rel=1e-5)
    after = reference.tensors(parts.trainables)
    for name, tensor in reference.tensors(whole.trainables).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes."""
    folder = tmp_path_factory.mktemp("lm")
    own = ["run.method=early_exit", f"data.root={folder}/texts", "data.batch_size=12", "optimizer.lr=0.01"]
    overrides = [part for text in (*SMALL, *own) for part in ("-o", text)]
    (folder / "texts").mkdir()
    (folder / "texts" / "rhyme.txt").write_text("the rat that ate the malt that lay in the house\n" * 400)
    scpl_dist("train", "--run-dir", folder / "run", *overrides)
    return folder / "run"


def test_processes_equal_a_plain_loop_and_the_command_measures_what_the_run_did(run: Path) -> None:
    config = load(run / "config.toml")
    assert losses(run) == in_threads.Run(config).result.losses
    shown = called("evaluate", run).stdout
    found = evaluate(run)
    assert f"test perplexity {found.metrics['perplexity']:.4f}" in shown
    assert found.total == data.resolve(config).sizes["test"] * 16


def test_tokens_leave_early_where_a_block_is_sure_enough(run: Path) -> None:
    whole = evaluate(run)
    early = evaluate(run, threshold=0.3)
    assert sum(early.left) == whole.total
    assert 1 <= early.mean_depth < 4
    first = evaluate(run, block=0)
    assert evaluate(run, threshold=1e-6).correct == first.correct
    assert evaluate(run, threshold=1.0).accuracy == whole.accuracy


def test_a_text_goes_on_in_the_same_way_with_the_same_seed(run: Path) -> None:
    arguments = ["generate", run, "--prompt", "the rat", "--tokens", 30]
    first, second, other, greedy = (
        called(*map(str, [*arguments, *more])).stdout
        for more in ([], [], ["--seed", 1], ["--temperature", 0])
    )
    assert first.startswith("the rat")
    assert len(first) == len("the rat") + 30 + 1
    assert first == second != other
    # By hand: the likeliest token after each beginning.
    text = "the rat"
    made = Generation(run, text, 5, temperature=0)
    for _ in range(5):
        [piece] = list(Generation(run, text, 1, top_k=1))
        text += piece
    assert "".join(["the rat", *made]) == text == greedy[: len(text)]
    assert made.mean_depth == 4


def test_a_token_that_leaves_early_is_the_one_of_its_block(run: Path) -> None:
    done = called("generate", run, "--prompt", "the rat", "--tokens", "9", "--exit-threshold", "1e-6")
    assert "mean depth 1.00 of 4 blocks" in done.stderr
    made = Generation(run, "the rat", 20, exit_threshold=0.3)
    assert "".join(made)
    assert 1 <= made.mean_depth < 4


REFUSED: list[tuple[list[Any], str]] = [
    (["--prompt", ""], "--prompt '': is empty"),
    (["--prompt", "the Σ"], "the run has no token for 'Σ'; give characters that its training texts have"),
    (["--prompt", "a", "--tokens", 0], "--tokens 0: give at least 1"),
    (["--prompt", "a", "--temperature", -1], "--temperature -1.0: give 0 for the likeliest token"),
    (["--prompt", "a", "--top-k", 0], "--top-k 0: give at least 1"),
    (["--prompt", "a", "--exit-threshold", 2], "--exit-threshold 2.0: give the probability"),
]


@pytest.mark.parametrize(("arguments", "problem"), REFUSED)
def test_what_cannot_be_generated_is_refused(arguments: list[Any], problem: str, run: Path) -> None:
    assert problem in called("generate", run, *map(str, arguments), code=2).stderr


def test_a_run_that_has_kept_no_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    done = called("generate", tmp_path, "--prompt", "a", code=2)
    assert (
        'is no run of a language model that has kept its tokens; train one with task.name = "lm"'
        in done.stderr
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ["task.name=classification"],
            'the label of a sample has shape (16,); use task.name = "lm" where each',
        ),
        (["data.name=digits", "data.args={}"], '"classification" where each sample has one class'),
        (["model.args.heads=3"], "model.args: width = 16 and heads = 3"),
        (["model.name=vgg_tiny", "model.args={}"], "does not fit: it cannot take (2, 16) from the data"),
        (["run.method=al"], 'run.method = "al" and task.name = "lm"'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    settings: list[str], problem: str, tmp_path: Path
) -> None:
    overrides = [part for text in (*SMALL, *settings) for part in ("-o", text)]
    done = called("train", "--dry-run", *overrides, code=2)
    assert problem in done.stderr
