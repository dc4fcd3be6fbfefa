"""Frames of the control plane: msgpack maps, checked on arrival.

Everything that comes from the network passes `decode`: limits first, then the shape of each message. Nothing in a
frame can build an object, and a frame that is no message is an error of its own, counted and dropped.
"""

from __future__ import annotations

from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from scpl_dist.control.messages import AnyMessage, Message

MAX_BYTES = 1 << 20
"""Longest frame, in bytes."""
MAX_TEXT = 1 << 18

_MESSAGES: TypeAdapter[Message] = TypeAdapter(AnyMessage)


class ProtocolError(ValueError):
    """A frame is no message of this protocol."""


def to_plain(message: Message) -> dict[str, Any]:
    """A message as plain values."""
    plain: dict[str, Any] = _MESSAGES.dump_python(message)
    return plain


def encode(message: Message) -> bytes:
    """A message as one frame.

    Raises:
        ProtocolError: it is too long.
    """
    frame: bytes = msgpack.packb(to_plain(message))
    if len(frame) > MAX_BYTES:
        name = type(message).__name__
        raise ProtocolError(f"a {name} message of {len(frame)} bytes is longer than {MAX_BYTES}")
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
        return _MESSAGES.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ProtocolError(f"{place} = {first['input']!r:.80}: {first['msg']:.200}") from None
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not a msgpack map: {error}") from None
