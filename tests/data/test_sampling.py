"""Samples are drawn by weights, and short batches left out, alike for any number of stages, replicas and resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from scpl_dist import data
from scpl_dist.control.items import Item, Train
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data.loader import Loader
from scpl_dist.data.sampling import draws, weights_of
from scpl_dist.run.config import Config, load
from tests.support import in_threads, reference
from tests.support.reference import tensors

SIZES = {"train": 25, "validation": 4, "test": 4}


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]).repeat_interleave(2000)
    counts = draws(weights, seed=0, epoch=0).div(2000, rounding_mode="floor").bincount(minlength=5).tolist()
    assert counts[0] == counts[2] == counts[4] == 0
    assert sum(counts) == 10000
    assert counts[3] / counts[1] == pytest.approx(3, rel=0.1)


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    weights = torch.rand(500)
    first = draws(weights, 3, 7)
    torch.manual_seed(1)
    assert torch.equal(draws(weights, 3, 7), first)
    assert not torch.equal(draws(weights, 3, 8), first)
    assert not torch.equal(draws(weights, 4, 7), first)


def rare(root: str) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Of ten samples, one is of class 1 and one of class 2."""
    labels = torch.arange(200) % 10
    labels = torch.where(labels < 3, labels, 0)
    whole = TensorDataset(torch.arange(200.0)[:, None], labels)
    return whole, whole, whole


def by_label(labels: torch.Tensor) -> list[float]:
    return [float(label == 2) for label in labels.tolist()]


def only_one(labels: torch.Tensor) -> list[float]:
    return [1.0]


def nothing(labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(labels))


def negative(labels: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(labels)) - 1


def broken(labels: torch.Tensor) -> str:
    return "heavy"


def drawn(sample_weights: str) -> torch.Tensor:
    """How often each class is fed in an epoch."""
    config = load(values={"data.name": f"{__name__}:rare", "data.sample_weights": sample_weights})
    source = data.resolve(config)
    loader: Loader[str] = Loader(source, 0, workers=0, weights=weights_of(config, source))
    loader.put("item", "train", 0, [(0, 200)], shuffled=True)
    (batch,) = loader.next()[1]
    return batch[1].bincount(minlength=3)


def test_balanced_draws_all_classes_alike() -> None:
    assert drawn("").tolist() == [160, 20, 20]
    counts = drawn("balanced")
    assert counts.sum() == 200
    assert counts.min() > 45


def test_a_function_of_the_users_weighs_each_sample() -> None:
    assert drawn(f"{__name__}:by_label").tolist() == [0, 0, 200]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (only_one, r"gave weights of shape \(1,\) for 200 training samples: give one weight for each label"),
        (nothing, "weights are finite, not negative, and not all 0"),
        (negative, "weights are finite, not negative, and not all 0"),
        (broken, "data.sample_weights = .*: gave str, no weights"),
    ],
)
def test_what_are_no_weights_is_refused(function: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        drawn(f"{__name__}:{function.__name__}")


def test_a_mistyped_word_is_answered_with_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"^data\.sample_weights = 'balance': unknown; use \"balanced\""):
        drawn("balance")


def test_labels_are_known_or_read() -> None:
    source = data.resolve(load(None, ["data.augmentation=strong"]))
    known = source.training_labels()
    assert torch.equal(data.DataSource.training_labels(source), known)
    assert len(known) == source.sizes["train"]


def test_replicas_share_what_is_drawn() -> None:
    config = load(values={"data.name": f"{__name__}:rare", "data.sample_weights": "balanced"})
    source = data.resolve(config)
    weights = weights_of(config, source)
    parts = []
    for replica in range(2):
        loader: Loader[str] = Loader(source, 0, 0, weights=weights)
        loader.share = (2, replica)
        loader.put("item", "train", 1, [(30, 51)], shuffled=True)
        parts.append(next(loader.next()[1])[0])
    assert weights is not None
    assert torch.cat(parts).flatten().tolist() == draws(weights, 0, 1)[30:51].tolist()


def small(classes: int) -> list[nn.Module]:
    return [nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)]


@pytest.mark.parametrize("stages", [1, 3])
def test_any_number_of_stages_learns_the_same_from_drawn_samples_and_full_batches(stages: int) -> None:
    own = [f"data.name={__name__}:rare", f"model.name={__name__}:small", "data.batch_size=64", "run.epochs=2"]
    settings = ["data.sample_weights=balanced", "data.drop_last=true", f"pipeline.stages={stages}"]
    config = load(None, [*own, *settings])
    wanted, found = reference.train(config), in_threads.Run(config).result
    assert len({step for step, _ in found.losses}) == 2 * (200 // 64)
    assert found.losses == wanted.losses
    weights = tensors(wanted.trainables)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors(found.trainables).items())


def items(config: Config, sizes: dict[str, int], position: Any = None) -> list[Item]:
    return list(iter(ItemSequence(config, sizes, position).next, None))


def test_the_last_batch_is_left_out_only_if_it_is_smaller() -> None:
    config = load(values={"data.batch_size": 10, "data.drop_last": True, "run.epochs": 2})
    for size in (20, 25):
        trained = [item for item in items(config, SIZES | {"train": size}) if isinstance(item, Train)]
        assert [item.micro_batches for item in trained] == [((0, 10),), ((10, 20),)] * 2
        assert [item.step for item in trained] == [0, 1, 2, 3]


def test_a_run_without_short_batches_goes_on_anywhere() -> None:
    config = load(values={"data.batch_size": 10, "data.drop_last": True, "run.epochs": 3})
    whole = [item for item in items(config, SIZES) if isinstance(item, Train)]
    for step in range(7):
        position = {"epoch": step // 2, "step": step, "batch": step % 2}
        rest = [item for item in items(config, SIZES, position) if isinstance(item, Train)]
        assert [(item.step, item.epoch, item.micro_batches, item.schedule) for item in rest] == [
            (item.step, item.epoch, item.micro_batches, item.schedule) for item in whole[step:]
        ]
    with pytest.raises(ValueError, match=r"resume with .* data\.drop_last"):
        ItemSequence(config, SIZES, {"epoch": 1, "step": 3, "batch": 0})  # of a run with short batches


def test_replicas_need_no_share_of_a_batch_that_is_left_out() -> None:
    values = {"data.batch_size": 8, "pipeline.replicas": 2}
    with pytest.raises(ValueError, match=r"the last micro-batch of an epoch has 1 sample"):
        ItemSequence(load(values=values), SIZES)
    ItemSequence(load(values=values | {"data.drop_last": True}), SIZES)


def test_an_epoch_without_a_full_batch_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.drop_last = true: data\.batch_size = 26 is more than the 25"
    ):
        ItemSequence(load(values={"data.batch_size": 26, "data.drop_last": True}), SIZES)
