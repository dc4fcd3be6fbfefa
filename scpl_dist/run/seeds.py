"""Random numbers that depend on what they are for, never on who draws them or when.

Every draw has a *purpose*, such as "order" or "weights", and a position (block, epoch, sample, step). The position is
hashed into a seed, so a replayed step, another number of stages or another number of loader threads draw the same.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed, which fits torch's ``int64``: the start of the BLAKE2b digest of the arguments."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_python(number: int) -> None:
    """Seed what ``random`` and numpy draw from; torch, which is not needed here, has a generator of its own."""
    random.seed(number)
    np.random.seed(number % 2**32)
