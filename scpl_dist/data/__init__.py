"""Data sets as three parts that are read by position; see `DataSource`."""

from __future__ import annotations

from scpl_dist.config import Config
from scpl_dist.data.digits import digits
from scpl_dist.data.source import DataSource, ImageSource
from scpl_dist.data.user import ItemSource, user

__all__ = ["DataSource", "ImageSource", "ItemSource", "resolve"]

_BUILT_IN = {"digits": digits}


def resolve(config: Config) -> DataSource:
    """Load the data set that ``data.name`` means.

    Raises:
        ValueError: unknown name, files that are missing or not readable, labels or shapes that do not fit.
    """
    name = config.data.name
    if ":" in name:
        return user(config)
    if name not in _BUILT_IN:
        raise ValueError(
            f"data.name = {name!r}: unknown; built in are {', '.join(_BUILT_IN)}; "
            "for your own write package.module:function or path/to/file.py:function"
        )
    if config.data.args and name == "digits":
        raise ValueError(
            f"data.args = {config.data.args!r}: data.name = {name!r} takes none; leave data.args out"
        )
    return _BUILT_IN[name](config)
