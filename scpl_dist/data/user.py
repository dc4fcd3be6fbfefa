"""A user's own data sets, given as ``package.module:function`` or ``path/to/file.py:function``.

The function is called as ``function(root, **args)`` and returns ``(train, validation, test)`` or ``(train,
test)`` map-style data sets of ``(input, label)``; without a validation part, a tenth of the training part
becomes it. They are fed as they are: whatever augmentation they need is theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate

from scpl_dist.data.source import SPLITS, DataSource, Split
from scpl_dist.data.splits import check_labels, complete
from scpl_dist.run.config import Config
from scpl_dist.run.imports import bind


def load(config: Config, function: Callable[..., Any]) -> ItemSource:
    """Call the function that ``data.name`` means and wrap what it returns."""
    name, root = config.data.name, config.data.root
    if config.data.augmentation == "strong":
        raise ValueError(
            f'data.augmentation = "strong": the data sets of {name} are fed as they are; set it to "none" '
            "and augment inside the data set"
        )
    returned = bind(function, "data.args", config.data.args, root, name=name)(root)
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise ValueError(f"data.name = {name!r}: return (train, validation, test) or (train, test) data sets")
    return ItemSource(name, list(returned))


class ItemSource(DataSource):
    """Map-style data sets (train, validation and test, or train and test), collated batch by batch.

    Shapes and labels are checked at once if a data set has no ``targets``; otherwise shapes are checked as batches
    are made.
    """

    def __init__(self, name: str, datasets: list[Any]) -> None:
        self._where = f"data.name = {name!r}"
        self._lock = threading.Lock()  # most data sets are not written for several threads
        given = SPLITS if len(datasets) == len(SPLITS) else ("train", "test")
        self._datasets = dict(zip(given, datasets, strict=True))
        labels = {
            split: self._labels(dataset, number)
            for number, (split, dataset) in enumerate(self._datasets.items())
        }
        named = getattr(datasets[0], "classes", None)
        # Labels of the training part decide, so that a class which only the test part has is found out.
        self.classes = len(named) if named is not None else max(labels["train"].tolist(), default=0) + 1
        self._parts = complete(labels, self.classes, self._where)
        self.sizes = {split: len(part.labels) for split, part in self._parts.items()}

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """See `DataSource.batch`; inputs of different shapes and a label that is no class are named and refused."""
        part = self._parts[split]
        chosen = part.positions[indices]
        dataset = self._datasets[part.stored]
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            # Rows of tensors have one shape and were checked at the start: take them at once.
            inputs, targets = dataset[chosen]
            return _single_precision(inputs), targets.to(torch.int64)
        positions = chosen.tolist()
        where = f"{self._where}, {split}"
        with self._lock:
            items = [dataset[position] for position in positions]
        labels = torch.tensor([_label(item[1], where, p) for p, item in zip(positions, items, strict=True)])
        check_labels(labels, self.classes, f"{where}, in the batch of {positions[:3]}...")
        return _collate(where, positions, [item[0] for item in items]), labels

    def _labels(self, dataset: Any, number: int) -> torch.Tensor:
        where = f"{self._where}, data set {number}"
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"{where}: is {type(dataset).__name__}, give one with a length and an index")
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = list(_read_labels(dataset, where))
        if len(targets) != len(dataset):
            raise ValueError(f"{where}: has {len(dataset)} samples but {len(targets)} targets")
        return torch.tensor(
            [_label(target, where, index) for index, target in enumerate(targets)], dtype=torch.int64
        )


def _read_labels(dataset: Any, where: str) -> Iterator[Any]:
    """Labels of all samples, whose shapes are checked on the way."""
    first: Any = None
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{where}: sample {index} is no pair of (input, label)")
        first = _shapes(item[0]) if index == 0 else first
        _check_shape(item[0], index, first, 0, where)
        yield item[1]


def _collate(where: str, positions: list[int], inputs: list[Any]) -> Any:
    first = _shapes(inputs[0])
    for position, value in zip(positions, inputs, strict=True):
        _check_shape(value, position, first, positions[0], where)
    try:
        collated = default_collate(inputs)
    except TypeError:
        raise ValueError(
            f"{where}: inputs are {type(inputs[0]).__name__}; "
            "return tensors, arrays, numbers, or dicts, lists or tuples of them"
        ) from None
    return pytree.tree_map_only(torch.Tensor, _single_precision, collated)


def _check_shape(value: Any, position: int, first: Any, first_position: int, where: str) -> None:
    if _shapes(value) != first:
        raise ValueError(
            f"{where}: sample {position} has shape {_shapes(value)}, sample {first_position} has {first}; "
            "all inputs need one shape"
        )


def _label(value: Any, where: str, index: int) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return int(value.__index__())
    except AttributeError:
        raise ValueError(
            f"{where}: sample {index} has label {value!r} of type {type(value).__name__}; "
            "labels are integers from 0"
        ) from None


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: tuple(leaf.shape) if hasattr(leaf, "shape") else (), value)


def _single_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
