"""Types of what comes from the network, with the limits that it is checked against.

Messages and items are frozen dataclasses of keywords, as `Shape` makes them: what this process makes itself is checked
by mypy and costs nothing at run time. Only what others have made is checked by pydantic, in `scpl_dist.control.codec`;
there an unknown key is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, dataclass_transform

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True)]
Duration = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
# One line of text: a name from the network must not steer a terminal.
Name = Annotated[str, Field(strict=True, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Shape:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
