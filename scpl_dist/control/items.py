"""The items of a run: what a stage handles in one go.

The coordinator sends them to stage 0, and they reach every other stage in the stream of tensors, in the same order.
Their keys on the wire are those of the classes, and "kind" says which class it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from scpl_dist.control.fields import Count, Flag, Name, Number, Shape

Range = tuple[Count, Count]
"""First position, and the one after the last."""
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Train(Shape):
    """One step."""

    kind: Literal["train"] = "train"
    sequence: Count
    """Counted from 0 in each generation, over items of all kinds."""
    step: Count
    epoch: Count
    schedule: dict[Name, Number]
    """What changes on the way, such as "lr", evaluated for this step."""
    micro_batches: tuple[Range, ...]
    """Positions in the epoch's order."""
    split: ClassVar[Split] = "train"

    @property
    def samples(self) -> int:
        return self.micro_batches[-1][1] - self.micro_batches[0][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(Shape):
    """One batch of the evaluation after an epoch."""

    kind: Literal["evaluate"] = "evaluate"
    sequence: Count
    epoch: Count
    split: Split
    micro_batches: tuple[Range, ...]
    """Positions in natural order."""
    last: Flag
    """Whether the split ends here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnd(Shape):
    """All steps of an epoch are done."""

    kind: Literal["epoch"] = "epoch"
    sequence: Count
    epoch: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Shape):
    """A cut through the whole pipeline."""

    kind: Literal["checkpoint"] = "checkpoint"
    sequence: Count
    step: Count
    """Steps done."""
    epoch: Count
    position: dict[Name, Count]
    """Where the sequence of items goes on after it."""
    due: Flag
    """Because it is time, and not only in case the epoch is the best."""
    unique: Name
    """Keeps its folder apart from those of other starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Shape):
    """The last item."""

    kind: Literal["stop"] = "stop"
    sequence: Count


Computed = Train | Evaluate
"""Items with samples."""
Marker = EpochEnd | Checkpoint | Stop
"""Items that are passed on first, and then acted upon."""
Item = Annotated[Computed | Marker, Field(discriminator="kind")]
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


def to_plain(item: Item) -> dict[str, Any]:
    """An item as plain values, equal to what arrives: lists, whatever travels in between."""
    plain: dict[str, Any] = _ITEM.dump_python(item, mode="json")
    return plain


def from_plain(plain: dict[str, Any]) -> Item:
    """The item that another worker passed on.

    Raises:
        ValueError: it is none.
    """
    return _ITEM.validate_python(plain)
