"""Frames of the control plane: msgpack maps, checked both ways.

Everything that comes from the network passes `decode`: limits first, then the shape of each message. Nothing in a
frame can build an object, and a frame that is no message is an error of its own, counted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
from pydantic import ValidationError

from scpl_dist.control.messages import MESSAGES, Message

MAX_BYTES = 1 << 20
"""Longest frame, in bytes."""


MAX_TEXT = 1 << 18


class ProtocolError(ValueError):
    """A frame is no message of this protocol."""


def encode(message: Message | Mapping[str, Any]) -> bytes:
    """A message as one frame.

    Raises:
        ProtocolError: the message does not have the shape of its type.
    """
    checked = message if isinstance(message, Message) else check(dict(message))
    frame: bytes = msgpack.packb(checked.model_dump())
    if len(frame) > MAX_BYTES:
        raise ProtocolError(f"a {checked.type!r} message of {len(frame)} bytes is longer than {MAX_BYTES}")
    return frame


def decode(frame: bytes) -> Message:
    """The message in a frame from anybody.

    Raises:
        ProtocolError: it is none; no other exception, whatever the bytes are.
    """
    if len(frame) > MAX_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is longer than {MAX_BYTES}")
    try:
        value = msgpack.unpackb(
            frame,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=0,
            max_ext_len=0,
            max_array_len=1 << 16,
            max_map_len=1 << 12,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not a msgpack map: {error}") from None
    return check(value)


def check(value: object) -> Message:
    if not isinstance(value, dict):
        raise ProtocolError(f"a {type(value).__name__} instead of a map")
    name = value.get("type")
    model = MESSAGES.get(name) if isinstance(name, str) else None
    if model is None:
        raise ProtocolError(f"unknown type {name!r:.80}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{name}.{place} = {first['input']!r:.80}: {first['msg']}") from None
    except RecursionError:
        raise ProtocolError(f"{name}: nested too deeply") from None
