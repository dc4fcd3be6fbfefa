"""A user's own data sets, given as ``package.module:function`` or ``path/to/file.py:function``.

The function is called as ``function(root, **args)`` and returns ``(train, validation, test)`` or ``(train,
test)`` map-style data sets of ``(input, label)``; without a validation part, a tenth of the training part
becomes it. They are fed as they are: whatever augmentation they need is theirs.

They may draw from torch, numpy and ``random``, which are seeded for the function by the run's seed and for
``__getitem__`` by (seed, epoch, index), with the epoch 0 for what is not trained on: a sample is the same whoever reads
it, and whatever was read before. A generator that a data set keeps for itself is not known here.

A data set may have the attribute ``collate_fn``, as a `torch.utils.data.DataLoader` takes it: a function of a list of
``(input, label)`` that returns the inputs as a pytree of tensors, batch first, and the labels ``(B,)``. Inputs may have
different shapes then. What it draws is seeded by (seed, epoch, indices).

The training set may have the attributes ``classes``, the names of the classes, and ``preprocessing``, a `Preprocessing`
that makes inputs of raw ones; both are kept with the run for predictions. Without it new inputs are tensors, too.
"""

from __future__ import annotations

import operator
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from scpl_dist.data.preprocessing import Preprocessing, Tensors, single_precision
from scpl_dist.data.readers import FORKS, Readers
from scpl_dist.data.source import SPLITS, DataSource, Labels, Split
from scpl_dist.data.splits import check_labels, complete
from scpl_dist.models.build import seed_generators, seeded
from scpl_dist.run.config import Config
from scpl_dist.run.imports import bind, blaming
from scpl_dist.run.seeds import derive

_AT_ONCE = 20  # samples that are read for their labels before the next look at the clock
_PATIENCE_S = 5.0  # seconds without a word


def load(config: Config, function: Callable[..., Any], labels: Labels) -> ItemSource:
    name, root = config.data.name, config.data.root
    if config.data.augmentation == "strong":
        raise ValueError(
            f'data.augmentation = "strong": the data sets of {name} are fed as they are; set it to "none" '
            "and augment inside the data set"
        )
    call = bind(function, "data.args", config.data.args, root, name=name)
    with blaming("data.name", name), seeded(config.run.seed, "data set"):
        returned = call(root)
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise ValueError(f"data.name = {name!r}: return (train, validation, test) or (train, test) data sets")
    splits: tuple[Split, ...] = SPLITS if len(returned) == 3 else ("train", "test")
    datasets = dict(zip(splits, returned, strict=True))
    with blaming("data.name", name):
        return ItemSource(f"data.name = {name!r}", datasets, config.run.seed, labels, config.data.workers)


class ItemSource(DataSource):
    """Map-style data sets, collated batch by batch.

    Shapes and labels are checked at once if a data set has no ``targets``; otherwise as batches are made. `labels` are
    those of an earlier look, which saves another one; they are not used for a data set that has another length now. A
    look takes so many processes as there are `workers`.
    """

    def __init__(
        self, where: str, datasets: dict[Split, Any], seed: int, labels: Labels, workers: int = 1
    ) -> None:
        self._where = where
        self._datasets = datasets
        self._seed = seed
        self._workers = workers
        self._lock = threading.Lock()  # most data sets are not written for several threads
        self.draws = not all(map(_stored, datasets.values()))
        found: dict[Split, list[int]] = {
            split: self._labels(split, f"{where}, data set {number}", labels.get(split, []))
            for number, split in enumerate(datasets)
        }
        self.labels = {split: found[split] for split in datasets if self._unlabelled(split)}
        named = getattr(datasets["train"], "classes", None)
        # Labels of the training part decide, so that a class which only the test part has is found out.
        self.classes = len(named) if named is not None else max(found["train"], default=0) + 1
        tensors: dict[str, torch.Tensor] = {
            split: torch.tensor(part, dtype=torch.int64) for split, part in found.items()
        }
        self._parts = complete(tensors, self.classes, where)
        self.preprocessing = _preprocessing(datasets["train"], named, self.classes, where)
        self.sizes = {split: len(part.labels) for split, part in self._parts.items()}

    def training_labels(self) -> torch.Tensor:
        """See `DataSource.training_labels`."""
        return self._parts["train"].labels

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """See `DataSource.batch`; inputs of different shapes and a label that is no class are named and refused."""
        part = self._parts[split]
        chosen = part.positions[indices]
        dataset = self._datasets[part.stored]
        if _stored(dataset) and type(dataset) is TensorDataset and len(dataset.tensors) == 2:
            # Rows of tensors have one shape and one label each, which was checked at the start: take them at once.
            inputs, targets = dataset[chosen]
            return single_precision(inputs), targets.to(torch.int64).flatten()
        positions = chosen.tolist()
        where = f"{self._where}, {split}"
        epoch = epoch if split == "train" else 0
        collate = _collate_of(dataset)
        with self._lock:
            samples = self._read(part.stored, epoch, positions)
            if collate is not None:
                with seeded(self._seed, "collate", epoch, *positions):
                    made = collate([item for _, item in samples])
                return _collated(made, part.labels[indices], where)
        labels = torch.tensor([_label(item[1], where, position) for position, item in samples])
        check_labels(labels, self.classes, f"{where}, in the batch of {positions[:3]}...")
        inputs = list(_alike(((position, _shapes(item[0]), item[0]) for position, item in samples), where))
        try:
            collated = default_collate(inputs)
        except TypeError:
            raise ValueError(
                f"{where}: inputs are {type(inputs[0]).__name__}; "
                "return tensors, arrays, numbers, or dicts, lists or tuples of them"
            ) from None
        return pytree.tree_map_only(torch.Tensor, single_precision, collated), labels

    def _read(self, stored: Split, epoch: int, positions: Iterable[int]) -> list[tuple[int, Any]]:
        dataset = self._datasets[stored]
        if _stored(dataset):
            return [(position, dataset[position]) for position in positions]
        samples = []
        with seeded(self._seed, "samples"):  # once: to put generators back takes longer than to seed them
            for position in positions:
                seed_generators(derive(self._seed, "sample", epoch, position))
                samples.append((position, dataset[position]))
        return samples

    def _unlabelled(self, split: Split) -> bool:
        """Whether every sample has to be read for its label."""
        return getattr(self._datasets[split], "targets", None) is None and not _stored(self._datasets[split])

    def _labels(self, split: Split, where: str, known: list[int]) -> list[int]:
        dataset = self._datasets[split]
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{where}: is {type(dataset).__name__}, which can only be read from its beginning; a run may go on at "
                "any sample, so give a data set with a length and an index"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"{where}: is {type(dataset).__name__}, give one with a length and an index")
        targets = getattr(dataset, "targets", None)
        if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
            targets = dataset.tensors[1]
        if targets is None and self._unlabelled(split) and len(known) == len(dataset):
            targets = known
        if targets is None:
            with closing(self._look_at_all(split, where)) as samples:
                targets = list(_alike(samples, where))
        if len(targets) != len(dataset):
            raise ValueError(f"{where}: has {len(dataset)} samples but {len(targets)} targets")
        if hasattr(targets, "tolist"):
            targets = targets.tolist()
        if type(dataset) is TensorDataset:  # a column has one label a sample, too
            targets = [
                target[0] if isinstance(target, list) and len(target) == 1 else target for target in targets
            ]
        return [_label(target, where, index) for index, target in enumerate(targets)]

    def _look_at_all(self, split: Split, where: str) -> Generator[tuple[int, Any, Any], None, None]:
        """Position, shapes and label of every sample, and a word now and then how far that is."""
        size, said = len(self._datasets[split]), time.monotonic()
        starts = range(0, size, _AT_ONCE)
        with self._many(partial(self._look, split, where), starts) as looks:
            for begin, found in zip(starts, looks, strict=True):
                yield from found
                if time.monotonic() - said > _PATIENCE_S:
                    said = time.monotonic()
                    note = f"{where}: read {begin + len(found)} of {size} samples for their labels"
                    print(f"{note}; an attribute targets would save this", file=sys.stderr, flush=True)

    def _look(self, split: Split, where: str, begin: int) -> list[tuple[int, Any, Any]]:
        found = []
        positions = range(len(self._datasets[split]))[begin : begin + _AT_ONCE]
        alike = _collate_of(self._datasets[split]) is None
        for index, item in self._read(split, 0, positions):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise ValueError(f"{where}: sample {index} is no pair of (input, label)")
            found.append((index, _shapes(item[0]) if alike else (), item[1]))
        return found

    @contextmanager
    def _many(self, look: Callable[[int], Any], starts: range) -> Iterator[Iterator[Any]]:
        """What a function gives for each, in order; in as many processes as there are workers, if that is worth it."""
        if self._workers < 2 or len(starts) < 2 or not self.draws or not FORKS:
            yield map(look, starts)
            return
        readers, pool = Readers(look, self._workers), ThreadPoolExecutor(self._workers)
        try:
            yield pool.map(readers, starts)
        finally:
            pool.shutdown(cancel_futures=True)
            readers.close()


def _preprocessing(dataset: Any, named: Any, classes: int, where: str) -> Preprocessing:
    """What makes inputs of new raw ones: the data set's own, or else they are tensors already."""
    found = getattr(dataset, "preprocessing", None)
    if found is None:
        return Tensors(classes=[str(name) for name in (named or range(classes))])
    if not isinstance(found, Preprocessing):
        raise ValueError(
            f"{where}: preprocessing is {type(found).__name__}; give a scpl_dist.data.Preprocessing"
        )
    if len(found.classes) != classes:
        raise ValueError(
            f"{where}: preprocessing names {len(found.classes)} classes, the labels have {classes}"
        )
    return found


def _collate_of(dataset: Any) -> Any:
    """The data set's own way to make a batch of samples, or None."""
    found = getattr(dataset, "collate_fn", None)
    return _collate_of(dataset.dataset) if found is None and type(dataset) is Subset else found


def _collated(batch: Any, labels: torch.Tensor, where: str) -> tuple[Any, torch.Tensor]:
    """What a user's function has made of samples with these labels, if it is a batch of them."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"{where}: collate_fn gave {type(batch).__name__}; return a pair of inputs and labels"
        )
    inputs, given = batch
    leaves = pytree.tree_leaves(inputs)
    if not leaves or not all(getattr(leaf, "shape", ())[:1] == labels.shape for leaf in leaves):
        raise ValueError(
            f"{where}: collate_fn gave inputs that are not all tensors with {len(labels)} rows, one for each sample"
        )
    if torch.as_tensor(given).flatten().tolist() != labels.tolist():
        raise ValueError(f"{where}: collate_fn gave other labels than the samples have, or in another order")
    return pytree.tree_map_only(torch.Tensor, single_precision, inputs), labels


def _stored(dataset: Any) -> bool:
    """Whether its samples are in memory as they are, so that none is drawn."""
    if _collate_of(dataset) is not None:
        return False
    if type(dataset) is Subset:
        return _stored(dataset.dataset)
    return type(dataset) in (list, tuple, TensorDataset)


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: tuple(getattr(leaf, "shape", ())), value)


def _alike(samples: Iterable[tuple[int, Any, Any]], where: str) -> Iterator[Any]:
    """What comes with position and shapes of each sample, if the shapes are those of the first one."""
    first: Any = None
    for position, shapes, value in samples:
        first = first or (position, shapes)
        if shapes != first[1]:
            raise ValueError(
                f"{where}: sample {position} has shape {shapes}, sample {first[0]} has {first[1]}; "
                "all inputs need one shape"
            )
        yield value


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
