"""A user's own data sets, given as ``package.module:function`` or ``path/to/file.py:function``.

The function is called as ``function(root, **args)`` and returns ``(train, validation, test)`` or ``(train,
test)`` map-style data sets of ``(input, label)``; without a validation part, a tenth of the training part
becomes it. They are fed as they are: whatever augmentation they need is theirs.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate

from scpl_dist.data.source import SPLITS, DataSource, Split, check_labels
from scpl_dist.data.splits import stratified
from scpl_dist.run.config import Config
from scpl_dist.run.imports import load_object


def load(config: Config) -> ItemSource:
    """Call the function that ``data.name`` means and wrap what it returns.

    Raises:
        ValueError: the function cannot be found or called, or returns something else than data sets.
    """
    name, args = config.data.name, config.data.args
    if config.data.augmentation == "strong":
        raise ValueError(
            f'data.augmentation = "strong": the data sets of {name} are fed as they are; set it to "none" '
            "and augment inside the data set"
        )
    function = load_object(name, "data.name")
    try:
        inspect.signature(function).bind(config.data.root, **args)
    except TypeError as error:
        raise ValueError(f"data.args = {args!r}: {name} cannot be called with them: {error}") from None
    returned = function(config.data.root, **args)
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise ValueError(f"data.name = {name!r}: return (train, validation, test) or (train, test) data sets")
    return ItemSource(name, list(returned))


class ItemSource(DataSource):
    """Map-style data sets, collated batch by batch.

    Args:
        name: the data set, for messages.
        datasets: train, validation and test, or train and test.

    Raises:
        ValueError: no length, no samples, labels that are no class, inputs of different shapes. Shapes and
            labels are checked here if a data set has no ``targets``; otherwise shapes are checked as batches
            are made.
    """

    def __init__(self, name: str, datasets: list[Any]) -> None:
        self._name = name
        self._lock = threading.Lock()  # most data sets are not written for several threads
        labels = [self._labels(dataset, position) for position, dataset in enumerate(datasets)]
        positions = [torch.arange(len(part)) for part in labels]
        named = getattr(datasets[0], "classes", None)
        # Labels of the training part decide, so that a class which only the test part has is found out.
        self.classes = len(named) if named is not None else max(labels[0].tolist(), default=0) + 1
        if len(datasets) == 2:
            check_labels(labels[0], self.classes, f"data.name = {name!r}, train")
            kept, held_out = stratified(labels[0], (0.1,))
            datasets = [datasets[0], datasets[0], datasets[1]]
            positions = [kept, held_out, positions[1]]
            labels = [labels[0][kept], labels[0][held_out], labels[1]]
        for split, part in zip(SPLITS, labels, strict=True):
            check_labels(part, self.classes, f"data.name = {name!r}, {split}")
        self._datasets = dict(zip(SPLITS, datasets, strict=True))
        self._positions = dict(zip(SPLITS, positions, strict=True))
        self.sizes = {split: len(part) for split, part in zip(SPLITS, labels, strict=True)}

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """See `DataSource.batch`.

        Raises:
            ValueError: inputs of different shapes, or a label that is no class; names the sample.
        """
        chosen = self._positions[split][indices]
        dataset = self._datasets[split]
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            # Rows of tensors have one shape and were checked at the start: take them at once.
            inputs, targets = dataset[chosen]
            return _single_precision(inputs), targets.to(torch.int64)
        positions = chosen.tolist()
        with self._lock:
            items = [self._datasets[split][position] for position in positions]
        labels = torch.tensor(
            [_label(item[1], f"{self._name}, {split}", p) for p, item in zip(positions, items, strict=True)]
        )
        check_labels(
            labels, self.classes, f"data.name = {self._name!r}, {split}, in the batch of {positions[:3]}..."
        )
        return self._collate(split, positions, [item[0] for item in items]), labels

    def _collate(self, split: str, positions: list[int], inputs: list[Any]) -> Any:
        first = _shapes(inputs[0])
        for position, value in zip(positions, inputs, strict=True):
            if _shapes(value) != first:
                raise ValueError(
                    f"data.name = {self._name!r}, {split}: sample {position} has shape {_shapes(value)}, "
                    f"sample {positions[0]} has {first}; all inputs need one shape"
                )
        try:
            collated = default_collate(inputs)
        except TypeError:
            raise ValueError(
                f"data.name = {self._name!r}, {split}: inputs are {type(inputs[0]).__name__}; "
                "return tensors, arrays, numbers, or dicts, lists or tuples of them"
            ) from None
        return pytree.tree_map_only(torch.Tensor, _single_precision, collated)

    def _labels(self, dataset: Any, number: int) -> torch.Tensor:
        where = f"data.name = {self._name!r}, data set {number}"
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"{where}: is {type(dataset).__name__}, give one with a length and an index")
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = []
            first: Any = None
            for index in range(len(dataset)):
                item = dataset[index]
                if not isinstance(item, tuple | list) or len(item) != 2:
                    raise ValueError(f"{where}: sample {index} is no pair of (input, label)")
                first = _shapes(item[0]) if index == 0 else first
                if _shapes(item[0]) != first:
                    raise ValueError(
                        f"{where}: sample {index} has shape {_shapes(item[0])}, sample 0 has {first}; "
                        "all inputs need one shape"
                    )
                targets.append(item[1])
        if len(targets) != len(dataset):
            raise ValueError(f"{where}: has {len(dataset)} samples but {len(targets)} targets")
        return torch.tensor(
            [_label(target, where, index) for index, target in enumerate(targets)], dtype=torch.int64
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
