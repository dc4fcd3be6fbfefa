"""The items of a run: what a stage handles in one go.

The coordinator sends them to stage 0, and they reach every other stage in the stream of tensors, in the same order.
Their keys on the wire are those of the classes, and "kind" says which class it is.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from scpl_dist.control.fields import Count, Flag, Name, Number, Shape

Range = tuple[Count, Count]  # first position, and the one after the last
Split = Literal["train", "validation", "test"]


class Train(Shape):
    kind: Literal["train"] = "train"
    sequence: Count  # counted from 0 in each generation, over items of all kinds
    step: Count
    epoch: Count
    schedule: dict[Name, Number]  # what changes on the way, such as "lr", evaluated for this step
    micro_batches: tuple[Range, ...]  # positions in the epoch's order
    share: Number = 1.0  # of the batch in its update
    update: Flag = True  # whether the update follows; if not, the gradients wait for those of the next batch
    split: ClassVar[Split] = "train"

    @property
    def samples(self) -> int:
        return self.micro_batches[-1][1] - self.micro_batches[0][0]


class Evaluate(Shape):
    """One batch of the evaluation after an epoch."""

    kind: Literal["evaluate"] = "evaluate"
    sequence: Count
    epoch: Count
    split: Split
    micro_batches: tuple[Range, ...]  # positions in natural order
    last: Flag  # whether the split ends here


class EpochEnd(Shape):
    kind: Literal["epoch"] = "epoch"
    sequence: Count
    epoch: Count


class Checkpoint(Shape):
    """A cut through the whole pipeline."""

    kind: Literal["checkpoint"] = "checkpoint"
    sequence: Count
    step: Count  # steps done
    epoch: Count
    position: dict[Name, Count]  # where the sequence of items goes on after it
    due: Flag  # because it is time, and not only in case the epoch is the best
    unique: Name  # keeps its folder apart from those of other starts


class Stop(Shape):
    kind: Literal["stop"] = "stop"
    sequence: Count


Computed = Train | Evaluate
Marker = EpochEnd | Checkpoint | Stop  # is passed on first, and then acted upon
Item = Annotated[Computed | Marker, Field(discriminator="kind")]
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


def to_plain(item: Item) -> dict[str, Any]:
    """An item as plain values, equal to what arrives: lists, whatever travels in between."""
    return dict(_ITEM.dump_python(item, mode="json"))


def from_plain(plain: dict[str, Any]) -> Item:
    """The item that another worker passed on; ValueError if it is none."""
    return _ITEM.validate_python(plain)
