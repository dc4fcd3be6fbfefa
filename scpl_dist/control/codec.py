"""Frames of the control plane: msgpack maps, checked on arrival.

Everything that comes from the network passes `decode`: limits first, then the shape of each message. Nothing in a
frame can build an object, and a frame that is no message is an error of its own, counted and dropped.
"""

from __future__ import annotations

from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from scpl_dist.control.messages import AnyMessage, Message

MAX_BYTES = 1 << 20  # of a frame; who sends a longer one is cut off by the socket

_MESSAGES: TypeAdapter[Message] = TypeAdapter(AnyMessage)


class ProtocolError(ValueError):
    """A frame is no message of this protocol."""


def to_plain(message: Message) -> dict[str, Any]:
    return dict(_MESSAGES.dump_python(message))


def encode(message: Message) -> bytes:
    """A message as one frame; ProtocolError if it is too long."""
    frame: bytes = msgpack.packb(to_plain(message))
    if len(frame) > MAX_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(frame)} bytes is longer than {MAX_BYTES}")
    return frame


def decode(frame: bytes) -> Message:
    """The message in a frame from anybody, or ProtocolError; no other exception, whatever the bytes are."""
    try:
        value = msgpack.unpackb(
            frame,
            strict_map_key=True,
            max_str_len=1 << 18,
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
