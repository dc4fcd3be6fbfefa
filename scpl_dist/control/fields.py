"""Types of what comes from the network, with the limits that it is checked against.

Messages and items are plain frozen dataclasses: what this process makes itself is checked by mypy and costs nothing at
run time, and only `scpl_dist.control.codec` has pydantic check what others have made.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True)]
Duration = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Name = Annotated[str, Field(strict=True, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text: a name from the network must not steer a terminal."""


class Shape:
    """Base of what travels: an unknown key is an error."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
