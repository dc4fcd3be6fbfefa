"""A data set may draw at random: its samples depend on (seed, epoch, index) alone, and the model's draws not on it."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from scpl_dist import data
from scpl_dist.data.loader import Batch, Loader
from scpl_dist.data.source import DataSource
from scpl_dist.data.user import ItemSource
from scpl_dist.run.config import load
from scpl_dist.run.errors import Aborted
from tests.support import in_threads, random_data, reference
from tests.support.reference import tensors

NOISY = f"data.name={random_data.__name__}:noisy"
MOODY = [NOISY, f"model.name={random_data.__name__}:moody", "data.batch_size=16", "run.epochs=2"]


def noisy(seed: int = 0) -> DataSource:
    return data.resolve(load(None, [NOISY, f"run.seed={seed}"]))


def batches(source: DataSource, workers: int, epoch: int = 0) -> list[Batch]:
    """Those of an item of four, read by so many processes at once."""
    loader: Loader[str] = Loader(source, 0, workers)
    try:
        loader.put("item", "train", epoch, [(0, 10), (10, 11), (11, 40), (40, 54)], shuffled=True)
        return list(loader.next()[1])
    finally:
        loader.abort(Aborted("the test is over"))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_samples_are_the_same_whoever_reads_them() -> None:
    alone = batches(noisy(), 0, epoch=1)
    assert same(batches(noisy(), 1, epoch=1), alone)
    source = noisy()
    source.batch("train", 3, torch.arange(7))
    assert same(batches(source, 3, epoch=1), alone)
    assert len({tuple(row) for inputs, _ in alone for row in inputs[:, 1:].tolist()}) == 54


def test_samples_depend_on_seed_epoch_and_index() -> None:
    base = noisy().batch("train", 1, torch.tensor([4, 2]))[0]
    assert torch.equal(noisy().batch("train", 1, torch.tensor([2]))[0], base[1:])
    for other in (
        noisy().batch("train", 2, torch.tensor([4, 2])),
        noisy(seed=1).batch("train", 1, torch.tensor([4, 2])),
    ):
        assert torch.equal(other[0][:, 0], base[:, 0])
        assert (other[0][:, 1:] != base[:, 1:]).all()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_what_is_not_trained_on_is_the_same_in_every_epoch(part: Any) -> None:
    first, later = (noisy().batch(part, epoch, torch.arange(3))[0] for epoch in (0, 5))
    assert torch.equal(first, later)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_draws_of_a_data_set_touch_no_others(workers: int) -> None:
    def draws() -> Iterator[float]:
        yield from (float(torch.rand(())), np.random.rand(), random.random())

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = list(draws())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    batches(noisy(), workers)
    assert list(draws()) == expected


@pytest.mark.parametrize("method", ["scpl", "bp"])
def test_a_model_that_draws_learns_the_same_from_a_data_set_that_draws(method: str) -> None:
    config = load(None, [*MOODY, f"run.method={method}", "pipeline.stages=1"])
    wanted, found = reference.train(config), in_threads.Run(config).result
    assert found.losses == wanted.losses
    assert found.accuracy == wanted.accuracy
    weights = tensors(wanted.trainables)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors(found.trainables).items())


def test_a_split_that_the_function_draws_is_the_same_in_every_process() -> None:
    source = [data.resolve(load(None, [f"data.name={__name__}:halves"])) for _ in range(2)]
    assert torch.equal(*(half.batch("train", 0, torch.arange(5))[0] for half in source))
    assert not source[0].draws


def halves(root: str) -> list[Subset[Any]]:
    whole = TensorDataset(torch.arange(80.0), torch.arange(80) % 2)
    return list(torch.utils.data.random_split(whole, [60, 20]))


class Broken(random_data.Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 1:
            raise ValueError("sample 1 is broken")
        if index == 2:
            raise Unreadable(1, 2)
        if index == 3:
            signal.raise_signal(signal.SIGKILL)
        return super().__getitem__(index)


class Unreadable(Exception):
    """Pickle writes it, but cannot make it again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"unreadable {one} {two}")


def test_what_a_reader_meets_is_heard_of(capfd: pytest.CaptureFixture[str]) -> None:
    known = {"train": [0, 1] * 5, "test": [0, 1] * 5}
    broken = Broken(10, None)
    source = ItemSource(
        "here", {"train": broken, "validation": broken, "test": broken}, 0, known | {"validation": [0, 1] * 5}
    )
    loader: Loader[str] = Loader(source, 0, workers=1)
    try:
        for number in range(5):
            loader.put("item", parts=[(number, number + 1)])
        made = [loader.next()[1] for _ in range(5)]
        assert next(made[0])[1].tolist() == [0]
        with pytest.raises(ValueError, match=r"^sample 1 is broken$"):
            next(made[1])
        with pytest.raises(RuntimeError, match="Unreadable: unreadable 1 2"):
            next(made[2])
        for batches in made[3:]:
            with pytest.raises(RuntimeError, match=r"has died.*data\.workers = 0"):
                next(batches)
    finally:
        loader.abort(Aborted("the test is over"))
    assert 'raise ValueError("sample 1 is broken")' in capfd.readouterr().err


def test_a_reader_ends_with_the_loader_and_leaves_signals_to_the_worker() -> None:
    before = set(psutil.Process().children())
    loader: Loader[str] = Loader(noisy(), 0, workers=2)
    readers = set(psutil.Process().children()) - before
    assert len(readers) == 2
    for part in ((0, 1), (1, 2)):  # both serve: they take turns
        loader.put("item", parts=[part])
        next(loader.next()[1])
    for reader in readers:
        reader.send_signal(signal.SIGINT)
    loader.put("item", parts=[(3, 6)])
    loader.put("item", parts=[(6, 9)])
    assert [len(next(loader.next()[1])[1]) for _ in range(2)] == [3, 3]
    loader.abort(Aborted("the test is over"))
    _, left = psutil.wait_procs(readers, timeout=30)
    assert not left


def test_labels_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(None, [NOISY, f"data.root={tmp_path}", "data.args.record=true"])
    first = data.resolve(config)
    assert {part: len(labels) for part, labels in first.labels.items()} == {"train": 60, "test": 20}
    again = data.resolve(config, first.labels)
    assert (tmp_path / "train").stat().st_size == 60
    assert (again.sizes, again.classes, again.labels) == (first.sizes, first.classes, first.labels)
    data.resolve(config, {part: labels[1:] for part, labels in first.labels.items()})  # of other files
    assert (tmp_path / "train").stat().st_size == 120
    assert capsys.readouterr().err == ""


def test_labels_are_read_by_all_workers(tmp_path: Path) -> None:
    config = load(None, [NOISY, f"data.root={tmp_path}", "data.args.record=true"])
    several = data.resolve(
        load(None, [NOISY, f"data.root={tmp_path}", "data.args.record=true", "data.workers=3"])
    )
    assert (tmp_path / "train").stat().st_size == 60
    assert several.labels == data.resolve(config).labels


def test_a_wrong_sample_that_workers_meet_is_named_and_ends_them() -> None:
    broken = {part: Broken(100, None) for part in ("train", "test")}
    before = psutil.Process().children()
    with pytest.raises(ValueError, match=r"^sample 1 is broken$"):
        ItemSource("here", {"train": broken["train"], "test": broken["test"]}, 0, {}, workers=2)
    uneven = [(torch.zeros(3 if index < 50 else 4), index % 2) for index in range(100)]
    with pytest.raises(ValueError, match=r"sample 50 has shape \(4,\), sample 0 has \(3,\)") as raised:
        ItemSource("here", {"train": Listed(uneven), "test": uneven}, 0, {}, workers=2)
    assert raised.tb is not None
    assert psutil.Process().children() == before


class Listed(list[Any]):
    """A list that may be more than one."""


def test_who_waits_long_for_labels_hears_how_far_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scpl_dist.data.user._PATIENCE_S", 0.0)
    noisy()
    said = capsys.readouterr().err
    assert "data set 0: read 20 of 60 samples for their labels" in said
    assert len(said.splitlines()) < 6
