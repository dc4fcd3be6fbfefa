"""Data sets as three parts that are read by position; see `DataSource`.

A name means a *loader*: a function ``(config, **data.args) -> DataSource`` of the run's `scpl_dist.run.config.Config`.
The package has digits, image_folder and text_lm; installed packages add theirs as entry points in the group
``scpl_dist.data``, as ``recipes/`` does:

    [project.entry-points."scpl_dist.data"]
    cifar10 = "scpl_dist_recipes.cifar:cifar10"

A loader reads files under ``config.data.root`` and returns an `ImageSource` or a `DataSource` of its own; parts that it
does not have are held out of the training part by `complete`, the same samples in every run. It raises ValueError with
path, what is wrong and the fix, and `MissingFiles` if the files are absent but known. ``data.args`` are checked against
the types that it declares, so these need to exist when it runs. What makes inputs of raw ones is its `preprocessing`.

For a single experiment there is a shorter way: ``data.name = "file.py:function"`` (see `scpl_dist.data.user`).
"""

from __future__ import annotations

from scpl_dist.data import user
from scpl_dist.data.folders import class_names, find_images, image_part
from scpl_dist.data.images import ImageSource
from scpl_dist.data.preprocessing import Preprocessing
from scpl_dist.data.source import DataSource, Labels, MissingFiles, Split
from scpl_dist.data.splits import complete
from scpl_dist.run.config import Config
from scpl_dist.run.imports import bind, checked
from scpl_dist.run.registry import Registry

__all__ = [
    "DATA",
    "DataSource",
    "ImageSource",
    "Labels",
    "MissingFiles",
    "Preprocessing",
    "Split",
    "class_names",
    "complete",
    "counts",
    "find_images",
    "image_part",
    "resolve",
]

DATA = Registry(
    "data",
    "data.name",
    {
        "digits": "scpl_dist.data.digits:load",
        "image_folder": "scpl_dist.data.folders:image_folder",
        "text_lm": "scpl_dist.data.text_lm:text_lm",
    },
)


def counts(config: Config, source: DataSource) -> list[int]:
    """Samples of each class in the training part, if the losses need them, or else an empty list."""
    if config.task.class_weights != "balanced":
        return []
    found: list[int] = source.training_labels().bincount(minlength=source.classes).tolist()
    return found


def resolve(config: Config, labels: Labels | None = None) -> DataSource:
    """Load the data set that ``data.name`` means, with ``data.args`` as keyword arguments of its loader.

    `labels` are what the source had as its `labels` when this data set was resolved before, to save the time.
    Whatever is wrong with them or the files is a ValueError; absent files of a known data set are `MissingFiles`.
    """
    name = config.data.name
    loader = DATA.find(name)
    if ":" in name:
        return user.load(config, loader, labels or {})
    load = bind(checked(loader, "data.args"), "data.args", config.data.args, config, name=name)
    source: DataSource = load(config)
    return source
