"""What a configuration names: built in, installed by another package, or written by the user.

"vgg_tiny"                  built in
"torchvision:resnet50"      a member of a built-in family, such as the models of another library
"resnet18"                  an entry point of an installed package, in the group of its kind such as scpl_dist.models
"file.py:net", "pkg.m:net"  the user's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from scpl_dist.run.imports import load_object


@dataclass(frozen=True)
class Registry:
    """One kind of thing that a configuration can name.

    Attributes:
        kind: in the plural, such as "models"; its entry points are in the group ``scpl_dist.<kind>``.
        key: configuration key that holds the name.
        builtin: name -> ``package.module:function``, imported when it is asked for.
        families: prefix -> ``package.module:function``, a function of what follows the colon that returns the thing.
    """

    kind: str
    key: str
    builtin: Mapping[str, str]
    families: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Callable[..., Any]:
        """The function or class of this name.

        Raises:
            ValueError: there is none; the message has the key, the name and what there is.
        """
        if name in self.builtin:
            return load_object(self.builtin[name], self.key)
        family, colon, member = name.partition(":")
        if family in self.families:
            made: Callable[..., Any] = load_object(self.families[family], self.key)(member)
            return made
        if colon:
            return load_object(name, self.key)
        installed = self._installed()
        if name in installed:
            found: Callable[..., Any] = installed[name].load()
            return found
        raise ValueError(
            f"{self.key} = {name!r}: unknown; use one of {', '.join(self.names())}, or your own as "
            "package.module:function or path/to/file.py:function"
        )

    def names(self) -> list[str]:
        """All names that need no path: built in, families, then installed."""
        families = [f"{family}:NAME" for family in self.families]
        return [*self.builtin, *families, *sorted(self._installed().keys() - self.builtin.keys())]

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"scpl_dist.{self.kind}")}
