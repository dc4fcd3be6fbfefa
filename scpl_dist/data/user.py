"""A user's own data sets, given as ``package.module:function`` or ``path/to/file.py:function``.

The function is called as ``function(root, **args)`` and returns ``(train, validation, test)`` or ``(train,
test)`` map-style data sets of ``(input, label)``; without a validation part, a tenth of the training part
becomes it. They are fed as they are: whatever augmentation they need is theirs.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate

from scpl_dist.data.source import SPLITS, DataSource, Split
from scpl_dist.data.splits import check_labels, complete
from scpl_dist.run.config import Config
from scpl_dist.run.imports import bind, blaming


def load(config: Config, function: Callable[..., Any]) -> ItemSource:
    name, root = config.data.name, config.data.root
    if config.data.augmentation == "strong":
        raise ValueError(
            f'data.augmentation = "strong": the data sets of {name} are fed as they are; set it to "none" '
            "and augment inside the data set"
        )
    call = bind(function, "data.args", config.data.args, root, name=name)
    with blaming("data.name", name):
        returned = call(root)
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise ValueError(f"data.name = {name!r}: return (train, validation, test) or (train, test) data sets")
    splits: tuple[Split, ...] = SPLITS if len(returned) == 3 else ("train", "test")
    with blaming("data.name", name):
        source = ItemSource(f"data.name = {name!r}", dict(zip(splits, returned, strict=True)))
        source.example()  # the first batch is made here, where an error of the data set is told in one line
    return source


class ItemSource(DataSource):
    """Map-style data sets, collated batch by batch.

    Shapes and labels are checked at once if a data set has no ``targets``; otherwise as batches are made.
    """

    def __init__(self, where: str, datasets: dict[Split, Any]) -> None:
        self._where = where
        self._datasets = datasets
        self._lock = threading.Lock()  # most data sets are not written for several threads
        labels: dict[str, torch.Tensor] = {
            split: torch.tensor(_labels(dataset, f"{where}, data set {number}"), dtype=torch.int64)
            for number, (split, dataset) in enumerate(datasets.items())
        }
        named = getattr(datasets["train"], "classes", None)
        # Labels of the training part decide, so that a class which only the test part has is found out.
        self.classes = len(named) if named is not None else max(labels["train"].tolist(), default=0) + 1
        self._parts = complete(labels, self.classes, where)
        self.sizes = {split: len(part.labels) for split, part in self._parts.items()}

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """See `DataSource.batch`; inputs of different shapes and a label that is no class are named and refused."""
        part = self._parts[split]
        chosen = part.positions[indices]
        dataset = self._datasets[part.stored]
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            # Rows of tensors have one shape and one label each, which was checked at the start: take them at once.
            inputs, targets = dataset[chosen]
            return _single_precision(inputs), targets.to(torch.int64).flatten()
        positions = chosen.tolist()
        where = f"{self._where}, {split}"
        with self._lock:
            samples = [(position, dataset[position]) for position in positions]
        labels = torch.tensor([_label(item[1], where, position) for position, item in samples])
        check_labels(labels, self.classes, f"{where}, in the batch of {positions[:3]}...")
        inputs = [item[0] for item in _alike(samples, where)]
        try:
            collated = default_collate(inputs)
        except TypeError:
            raise ValueError(
                f"{where}: inputs are {type(inputs[0]).__name__}; "
                "return tensors, arrays, numbers, or dicts, lists or tuples of them"
            ) from None
        return pytree.tree_map_only(torch.Tensor, _single_precision, collated), labels


def _labels(dataset: Any, where: str) -> list[int]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{where}: is {type(dataset).__name__}, give one with a length and an index")
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [item[1] for item in _alike(_pairs(dataset, where), where)]
    if len(targets) != len(dataset):
        raise ValueError(f"{where}: has {len(dataset)} samples but {len(targets)} targets")
    return [_label(target, where, index) for index, target in enumerate(targets)]


def _pairs(dataset: Any, where: str) -> Iterator[tuple[int, Any]]:
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"{where}: sample {index} is no pair of (input, label)")
        yield index, item


def _alike(samples: Iterable[tuple[int, Any]], where: str) -> Iterator[Any]:
    """Samples, given with their positions, if their inputs have the shapes of the first one's."""
    first: Any = None
    for position, item in samples:
        shapes = pytree.tree_map(lambda leaf: tuple(getattr(leaf, "shape", ())), item[0])
        first = first or (position, shapes)
        if shapes != first[1]:
            raise ValueError(
                f"{where}: sample {position} has shape {shapes}, sample {first[0]} has {first[1]}; "
                "all inputs need one shape"
            )
        yield item


def _label(value: Any, where: str, index: int) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return operator.index(value)
    except TypeError:
        several = hasattr(value, "__len__") and not isinstance(value, str)
        what = f"{len(value)} labels" if several else f"label {value!r}"
        raise ValueError(
            f"{where}: sample {index} has {what} of type {type(value).__name__}; "
            "each sample has one class, an integer from 0"
        ) from None


def _single_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
