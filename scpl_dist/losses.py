"""Local objectives: what a block is trained on while no gradient reaches it from later blocks.

Written for one stage's whole batch: the contrastive loss compares all its samples with each other, so
cutting a batch in parts changes the loss. Everything is computed in float32 whatever the precision of the
features.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["supcon"]


def supcon(
    features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1, divisor: str = "all"
) -> torch.Tensor:
    """Supervised contrastive loss of projected features.

    With ``z = features / |features|``, ``s_ij = z_i . z_j / temperature`` and ``P(i)`` the other samples
    with the label of ``i``::

        L = -(1/N) sum_i 1/divisor_i sum_{p in P(i)} ( s_ip - log sum_{a != i} exp(s_ia) )

    ``divisor_i`` is ``|P(i)| + 1`` for "all", as in the published code of SCPL (arXiv 2602.00062), and
    ``|P(i)|`` for "positives", which is L_out of Khosla et al. (arXiv 2004.11362, equation 2) averaged over
    the batch. An anchor without positives contributes 0 to the sum and counts in N.

    Args:
        features: ``(N, D)``, floating point, not normalised.
        labels: ``(N,)``, integers.
        temperature: divisor of the cosine similarities, above 0.
        divisor: "all" or "positives", ``loss.divisor``.

    Returns:
        A float32 scalar. It is 0 with a gradient of 0 for fewer than two samples, which have no pair to
        compare.
    """
    size = features.shape[0]
    if size < 2:
        return features.float().sum() * 0.0
    normalised = F.normalize(features.float(), dim=1, eps=1e-12)
    similarity = normalised @ normalised.T / temperature
    itself = torch.eye(size, dtype=torch.bool, device=features.device)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    count = positive.sum(dim=1)
    normaliser = similarity.masked_fill(itself, float("-inf")).logsumexp(dim=1)
    log_likelihood = (similarity * positive).sum(dim=1) - count * normaliser
    weight = count + 1 if divisor == "all" else count.clamp(min=1)
    return -(log_likelihood / weight).mean()
