"""Random numbers that depend on what they are for, never on who draws them or when.

Every draw has a *purpose* and a position (block, epoch, sample, step). The position is hashed into a seed, so a
replayed step, another number of stages or another number of loader threads draw the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def derive(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for one purpose at one position.

    Args:
        seed: the run's seed, ``run.seed``.
        purpose: what the numbers are for, such as ``"order"``, ``"augmentation"``, ``"weights"``, ``"dropout"``.
        position: where in the run: block, epoch, sample, step, in a fixed order for each purpose.

    Returns:
        The first 63 bits of the BLAKE2b digest of the arguments, which fits torch's ``int64`` seeds.
    """
    text = ":".join([str(seed), purpose, *map(str, position)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
