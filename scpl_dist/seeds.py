"""Random numbers that depend on what they are for, never on who draws them or when.

Every draw has a *purpose* and a position (block, epoch, sample, step). The position is hashed into a seed, so a
replayed step, another number of stages or another number of loader threads draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive", "permutation", "seeded"]


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


def permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    """The order of the training samples in one epoch.

    Returns:
        An ``int64`` tensor of shape ``(size,)``, a permutation of ``0..size-1`` drawn from (seed, epoch) alone.
    """
    import torch

    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


@contextmanager
def seeded(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block and put its state back afterwards.

    For code that takes no generator: the initialisation of modules and, on a CPU, dropout.
    """
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, purpose, *position))
    try:
        yield
    finally:
        torch.set_rng_state(state)
