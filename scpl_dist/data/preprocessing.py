"""What a data set does to a raw input before block 0 is given it, kept with the run for inputs that come later.

A data source has its *preprocessing* as an attribute and uses it for its own samples, so training and prediction cannot
differ. It is plain settings, perhaps with files beside them, and is written into the run folder by `describe` and read
by `restore`; the classes are found by name, so a data set of your own may have one of your own:

    class Reversed(Preprocessing):          # in the file of the data set
        def batch(self, inputs): return torch.tensor([list(row)[::-1] for row in inputs])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from scpl_dist.run.imports import name_of
from scpl_dist.run.registry import Registry

KINDS = Registry(
    "preprocessing",
    "kind",
    {
        "tensors": "scpl_dist.data.preprocessing:Tensors",
        "images": "scpl_dist.data.pictures:Images",
        "characters": "scpl_dist.data.tokens:Characters",
        "bytes": "scpl_dist.data.tokens:Bytes",
        "tokenizer": "scpl_dist.data.tokens:Trained",
    },
)


class Preprocessing(BaseModel):
    """Settings are the fields, plain values that JSON can have; larger things are files, see `save` and `load`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: ClassVar[str] = ""  # its name in `KINDS`; the empty one is its class, as package.module:Class

    classes: list[str]
    """Names of the classes, in the order of their labels."""

    def batch(self, inputs: Sequence[Any]) -> Any:
        """What block 0 is given for raw inputs: a pytree of tensors, batch first. ValueError if one is none."""
        raise NotImplementedError

    def read(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Raw inputs of a file or folder, one after the other, each with a name to tell it by."""
        raise ValueError(
            f"{path}: the inputs of this model are not read from files; use scpl_dist.load in Python"
        )

    def doubts(self) -> Iterator[str]:
        """What was noticed of the inputs until here, such as how many were cut."""
        yield from ()

    def save(self, folder: Path) -> None:
        """Write what is no plain setting, such as a tokeniser, as files into an empty folder."""

    @classmethod
    def load(cls, settings: Mapping[str, Any], folder: Path) -> Self:
        """The same again from its settings and the folder of its files."""
        return cls.model_validate(settings)


class Tensors(Preprocessing):
    """Inputs are what the model eats already: tensors, arrays or numbers, or dicts, lists or tuples of them."""

    kind = "tensors"

    def batch(self, inputs: Sequence[Any]) -> Any:
        try:
            collated = default_collate(list(inputs))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the inputs make no batch: {error}; all need one shape") from None
        return pytree.tree_map_only(Tensor, single_precision, collated)

    def read(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Rows of a file of numpy, ``.npy``."""
        if path.suffix != ".npy" or not path.is_file():
            raise ValueError(
                f"{path}: give a file .npy of numpy with one input a row, as the model reads tensors"
            )
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as an array: {error}") from None
        yield from ((str(index), np.array(row)) for index, row in enumerate(rows))


def single_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def describe(preprocessing: Preprocessing) -> dict[str, Any]:
    """Its kind and settings as plain values. ValueError for a class that no other process can import."""
    made = type(preprocessing)
    return {"kind": made.kind or name_of(made), "settings": preprocessing.model_dump(mode="json")}


def restore(described: Mapping[str, Any], folder: Path) -> Preprocessing:
    """What `describe` has told of; `folder` has the files that its `save` has written."""
    made: object = KINDS.find(described["kind"])
    assert isinstance(made, type)
    assert issubclass(made, Preprocessing)
    try:
        return made.load(described["settings"], folder)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(["settings", *map(str, problem["loc"])])
        raise ValueError(
            f"the preprocessing of this run is of another version: {place}: {problem['msg']}"
        ) from None
