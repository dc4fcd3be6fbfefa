"""A data set may make its batches itself, from samples of any shapes; what cannot be read by position is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Subset

from scpl_dist import data
from scpl_dist.data.loader import Loader
from scpl_dist.data.source import DataSource
from scpl_dist.run.config import load
from scpl_dist.run.errors import Aborted

Sample = tuple[Tensor, int]


class Sequences(Dataset[Sample]):
    """Sample i is i ones, (i % 9 + 1) of them, and of class i % 2; a batch is padded, with a random token in front."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Sample:
        return torch.full((index % 9 + 1,), float(index), dtype=torch.float64), index % 2

    def collate_fn(self, samples: list[Sample]) -> tuple[dict[str, Tensor], Tensor]:
        padded = pad_sequence([sample for sample, _ in samples], batch_first=True)
        lengths = torch.tensor([len(sample) for sample, _ in samples])
        inputs = {"tokens": padded, "lengths": lengths, "draw": torch.rand(len(samples))}
        return inputs, torch.tensor([label for _, label in samples])


def sequences(root: str) -> tuple[Any, Any]:
    return Subset(Sequences(), range(50)), Subset(Sequences(), range(50, 60))


def batches(source: DataSource, workers: int) -> list[Any]:
    loader: Loader[str] = Loader(source, 0, workers)
    try:
        loader.put("item", "train", 1, [(0, 10), (10, 20)], shuffled=True)
        return list(loader.next()[1])
    finally:
        loader.abort(Aborted("the test is over"))


def test_a_data_set_makes_its_batches_itself_whoever_reads_them() -> None:
    source = data.resolve(load(values={"data.name": f"{__name__}:sequences"}))
    assert source.draws
    inputs, labels = source.batch("test", 0, torch.tensor([0, 3, 1]))
    assert inputs["tokens"].dtype == torch.float32
    assert inputs["tokens"].shape == (3, 9)  # samples 50, 53 and 51 have 6, 9 and 7
    assert inputs["lengths"].tolist() == [6, 9, 7]
    assert inputs["tokens"][:, 0].tolist() == [50, 53, 51]
    assert labels.tolist() == [0, 1, 1]
    alone, apart = batches(source, 0), batches(source, 2)
    for (one, labels), (other, others) in zip(alone, apart, strict=True):
        assert torch.equal(labels, others)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(alone[0][0]["draw"], alone[1][0]["draw"])


Collate = Callable[[list[Sample]], Any]
WRONG: list[tuple[Collate, str]] = [
    (lambda samples: torch.zeros(2), "collate_fn gave Tensor; return a pair of inputs and labels"),
    (lambda samples: ({"x": torch.zeros(3, 2)}, [0, 0]), "not all tensors with 2 rows, one for each sample"),
    (lambda samples: (torch.tensor(0), [0, 0]), "not all tensors with 2 rows"),
    (lambda samples: (["text"] * 2, [0, 0]), "not all tensors with 2 rows"),
    (lambda samples: (torch.zeros(2, 2), [1, 0]), "other labels than the samples have"),
]


def wrong(root: str, number: int) -> tuple[Any, Any]:
    parts = Sequences(), Sequences()
    for part in parts:
        part.collate_fn = WRONG[number][0]  # type: ignore[method-assign, assignment]
    return parts


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_no_batch_is_refused(number: int) -> None:
    source = data.resolve(load(values={"data.name": f"{__name__}:wrong", "data.args": {"number": number}}))
    with pytest.raises(ValueError, match=WRONG[number][1]):
        source.example()


class Endless(IterableDataset[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        yield Sequences()[0]

    def __len__(self) -> int:
        return 60


def endless(root: str) -> tuple[Any, Any]:
    return Endless(), Endless()


def test_an_iterable_data_set_is_refused_with_the_reason() -> None:
    says = "Endless, which can only be read from its beginning; a run may go on at any sample, so give a data set with"
    with pytest.raises(ValueError, match=says):
        data.resolve(load(values={"data.name": f"{__name__}:endless"}))
