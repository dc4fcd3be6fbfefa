"""What a configuration names: built in, installed by another package, or written by the user.

"vgg_tiny"                  built in
"resnet18"                  an entry point of an installed package, in the group of its kind such as scpl_dist.models
"torchvision:resnet50"      a member of a family such as the models of another library: what has the name "torchvision:"
                            is a function of the member's name
"file.py:net", "pkg.m:net"  the user's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from scpl_dist.run.imports import load_object


@dataclass(frozen=True)
class Registry:
    kind: str  # in the plural, such as "models"; its entry points are in the group scpl_dist.models
    key: str  # of the configuration, which holds the name
    builtin: Mapping[str, str]  # name -> package.module:function, imported when it is asked for

    def find(self, name: str) -> Callable[..., Any]:
        """The function or class of this name; ValueError with the key, the name and what there is if there is none."""
        if name in self.builtin:
            return load_object(self.builtin[name], self.key)
        family, colon, member = name.partition(":")
        if colon and family + colon in self.builtin:
            made: Callable[..., Any] = load_object(self.builtin[family + colon], self.key)(member)
            return made
        point = self._installed().get(family + colon)
        if point is not None:
            found: Callable[..., Any] = point.load()(member) if colon else point.load()
            return found
        if colon:
            return load_object(name, self.key)
        raise ValueError(
            f"{self.key} = {name!r}: unknown; use one of {', '.join(self.names())}, or your own as "
            "package.module:function or path/to/file.py:function"
        )

    def names(self) -> list[str]:
        """All names that need no path: built in, families, then installed."""
        installed = sorted(self._installed().keys() - self.builtin.keys())
        families = [f"{name}NAME" for name in (*self.builtin, *installed) if name.endswith(":")]
        plain, others = (
            [name for name in known if not name.endswith(":")] for known in (self.builtin, installed)
        )
        return [*plain, *families, *others]

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"scpl_dist.{self.kind}")}
