"""Data sets as three parts that are read by position; see `DataSource`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from scpl_dist.data import corpora, digits, docstrings, images, user
from scpl_dist.data.outline import outline
from scpl_dist.data.source import DataSource, ImageSource
from scpl_dist.data.text import TextSource
from scpl_dist.data.user import ItemSource
from scpl_dist.run.config import Config
from scpl_dist.run.imports import checked

__all__ = ["DataSource", "ImageSource", "ItemSource", "TextSource", "names", "outline", "resolve"]

_LOADERS: dict[str, Callable[..., DataSource]] = {
    "digits": digits.load,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
    "tiny_imagenet": images.tiny_imagenet,
    "image_folder": images.image_folder,
    "docstrings": docstrings.load,
    "csv": corpora.table,
    **dict.fromkeys(corpora.PUBLISHED, corpora.published),
}


def names() -> list[str]:
    """Names of the built-in data sets."""
    return list(_LOADERS)


def resolve(config: Config) -> DataSource:
    """Load the data set that ``data.name`` means, with ``data.args`` as keyword arguments of its loader.

    Raises:
        ValueError: unknown name or arguments, files that are missing or not readable, labels or shapes that
            do not fit.
    """
    name, args = config.data.name, config.data.args
    if ":" in name:
        return user.load(config)
    if name not in _LOADERS:
        raise ValueError(
            f"data.name = {name!r}: unknown; built in are {', '.join(names())}; "
            "for your own write package.module:function or path/to/file.py:function"
        )
    loader = _LOADERS[name]
    try:
        inspect.signature(loader).bind(config, **args)
    except TypeError:
        known = list(inspect.signature(loader).parameters)[1:]
        raise ValueError(
            f"data.args = {args!r}: {name} takes {', '.join(known) if known else 'no arguments'}"
        ) from None
    source: DataSource = checked(loader, "data.args")(config, **args)
    return source
