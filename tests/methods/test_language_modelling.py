"""The task lm: what torch says of all tokens, whatever the batches they come in; heads that keep tokens apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import resolve
from scpl_dist.methods.task import COMPARED, IGNORED, LanguageModelling, labelled, make, plain
from scpl_dist.run.config import TaskSettings, load
from scpl_dist.run.scores import add, values

CLASSES = 7


def answers(texts: int = 4, length: int = 5) -> tuple[Tensor, Tensor]:
    """Scores and labels, of which the first text lacks three."""
    generator = torch.Generator().manual_seed(texts)
    labels = torch.randint(CLASSES, (texts, length), generator=generator)
    labels[0, 1:4] = IGNORED
    return torch.randn(texts, length, CLASSES, generator=generator), labels


def test_loss_accuracy_and_perplexity_are_those_of_all_tokens() -> None:
    task = LanguageModelling(CLASSES, TaskSettings(label_smoothing=0.1, metrics=["top5"]))
    scores, labels = answers()
    flat, there = scores.view(-1, CLASSES), (labels != IGNORED).flatten()
    smooth = functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(scores, labels), smooth, rtol=0, atol=0)
    plainly = functional.cross_entropy(flat[there], labels.flatten()[there])
    right = (flat.argmax(1) == labels.flatten())[there].float().mean()
    for cuts in ([(0, 4)], [(0, 1), (1, 4)]):  # the parts have unequal numbers of tokens
        found = values(add(plain(task.metrics(scores[a:b], labels[a:b])) for a, b in cuts), CLASSES, ["top5"])
        assert found["loss"] == pytest.approx(float(smooth), rel=1e-5)
        assert found["perplexity"] == pytest.approx(float(plainly.exp()), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(right))
        assert found["top5"] >= found["accuracy"]


def test_a_perplexity_beyond_all_numbers_is_none() -> None:
    assert values({"perplexity": (1e4, 2)}, CLASSES, [])["perplexity"] is None


@pytest.mark.parametrize("kind", [None, "l", "norm", "tanh,6"])
def test_a_head_answers_for_each_token_alone(kind: str | None) -> None:
    task, features = LanguageModelling(CLASSES), torch.randn(2, 4, 6)
    head = task.head(nn.Identity(), features, kind)
    scores = head(features)
    assert scores.shape == (2, 4, CLASSES)
    other = features.clone()
    other[:, 2] += 1
    changed = (head(other) != scores).any(-1).any(0)
    assert changed.tolist() == [False, False, True, False]


def test_a_contrastive_loss_sees_tokens_by_the_next_one_the_same_in_every_place() -> None:
    task = LanguageModelling(CLASSES)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (40, 33), generator=generator)
    labels[3] = IGNORED
    places = torch.arange(labels.numel()).view(*labels.shape, 1).float()
    features, classes = task.compared(places, labels)
    assert 0 < len(classes) <= COMPARED
    assert torch.equal(classes, labels.flatten()[features[:, 0].long()])
    assert IGNORED in classes
    rows, known = labelled(features, classes)
    assert torch.equal(known, labels.flatten()[rows[:, 0].long()])
    assert len(known) + int((classes == IGNORED).sum()) == len(classes)
    assert IGNORED not in known
    again, _ = task.compared(places, labels.clone())
    assert torch.equal(features, again)
    assert not torch.equal(task.compared(places, labels + (labels >= 0))[0][:50], features[:50])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task.class_weights": "balanced"}, "task.class_weights = 'balanced': is for samples that have one"),
    ({"task.metrics": ["confusion"]}, r"task.metrics = \['confusion'\]: is for samples that have one"),
    ({"data.sample_weights": "balanced"}, "data.sample_weights = 'balanced': is for samples that have one"),
    ({"run.method": "al"}, 'run.method = "al" and task.name = "lm": .*use early_exit'),
    ({"loss.name": "predsim"}, 'loss.name = "predsim" and task.name = "lm"'),
    ({"loss.projector": "mb"}, "loss.projector = 'mb': of tokens there are"),
    (
        {"run.method": "gpipe", "pipeline.micro_batches": 2, "pipeline.replicas": 2},
        "pipeline.micro_batches = 2 and pipeline.replicas = 2: parts of a batch are weighed by their tokens",
    ),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED)
def test_what_means_nothing_for_tokens_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_a_block({"task.name": "lm", **settings})


def make_a_block(settings: dict[str, Any]) -> None:
    config, features = load(values=settings), torch.empty(2, 4, 6, device="meta")
    method = resolve(config.run.method)(config, 2, LanguageModelling(CLASSES, config.task))
    method.trainable(0, nn.Identity(), features, features)


def test_a_model_that_joins_its_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Identity gives a feature of shape \(2, 6\).*such as gpt"):
        LanguageModelling(CLASSES).head(nn.Identity(), torch.empty(2, 6))


def test_halves_of_texts_are_means_over_their_tokens_and_belong_together() -> None:
    task = make(TaskSettings(name="lm", compared="halves"), 50)
    features = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[1, 5:] = -100
    found, classes = task.compared(features, labels)
    assert classes.tolist() == [0, 1, 2, 0, 1, 2]
    expected = [features[n, :3].mean(0) for n in range(3)]
    expected += [features[0, 3:].mean(0), features[1, 3:5].mean(0), features[2, 3:].mean(0)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_halves_are_of_texts_only() -> None:
    with pytest.raises(
        ValueError, match=r'task\.compared = "halves": halves of a text are for task.name = "lm"'
    ):
        load(values={"task.compared": "halves"})


def test_what_is_compared_means_something_to_a_method_that_compares() -> None:
    config = load(values={"task.name": "lm", "task.compared": "halves"})
    assert resolve("scpl").unread(config) == {}
    for method in ("early_exit", "bp", "gpipe", "al"):
        assert resolve(method).unread(config) == {"task.compared": "tokens"}
