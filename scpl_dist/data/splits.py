"""Cuts a data set in parts that keep the shares of the classes and never change.

A split is a property of the data set, not of a run: it does not depend on ``run.seed``, so the test samples
of two runs are the same. Rare classes are allowed: a class with one sample stays in the first part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scpl_dist.run.seeds import derive


def stratified(labels: torch.Tensor, shares: Sequence[float]) -> list[torch.Tensor]:
    """Positions of the samples of each part.

    Args:
        labels: ``(N,)`` integers.
        shares: share of each part except the first, which gets the rest; for example ``(0.1, 0.2)``.

    Returns:
        One sorted ``int64`` tensor of positions for each part: the first, then one for each share. Each
        share is rounded down within each class.
    """
    parts = [[torch.empty(0, dtype=torch.int64)] for _ in range(len(shares) + 1)]
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(derive(0, "split", int(label)))
        members = members[torch.randperm(len(members), generator=generator)]
        start = 0
        for part, share in zip(parts[1:], shares, strict=True):
            end = start + int(len(members) * share)
            part.append(members[start:end])
            start = end
        parts[0].append(members[start:])
    return [torch.cat(part).sort().values for part in parts]
