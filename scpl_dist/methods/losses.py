"""Local objectives: what a block is trained on while no gradient reaches it from later blocks.

The contrastive loss compares all samples of a batch with each other, so cutting a batch in parts changes it. Everything
is computed in float32 whatever the precision of the features.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

PAIRS = 1 << 24  # pairs of samples whose similarities `supcon` has in memory at once: 64 MiB in float32


def supcon(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 0.1,
    divisor: str = "all",
    ignored: int | None = None,
) -> torch.Tensor:
    """Supervised contrastive loss of projected features.

    With ``z = features / |features|``, ``s_ij = z_i . z_j / temperature`` and ``P(i)`` the other samples with the label
    of ``i``::

        L = -(1/N) sum_i 1/divisor_i sum_{p in P(i)} ( s_ip - log sum_{a != i} exp(s_ia) )

    ``divisor_i`` is ``|P(i)| + 1`` for "all", as in the published code of SCPL (arXiv 2602.00062), and ``|P(i)|`` for
    "positives", which is L_out of Khosla et al. (arXiv 2004.11362, equation 2) averaged over the batch. An anchor
    without positives contributes 0 to the sum and counts in N. Features are ``(N, D)``, not normalised,
    labels ``(N,)``. The loss is a float32 scalar: 0 with a gradient of 0 for fewer than two samples. It is that of the
    samples whose label is not `ignored`, as if there were no others.

    Up to 4096 samples all pairs are in memory at once. Of more, as many anchors as make `PAIRS` pairs come after each
    other, and their similarities are computed again for the backward pass: memory is linear in N, for 4/3 of the work.
    """
    size = features.shape[0]
    if size < 2:
        return features.float().sum() * 0.0
    normalised = functional.normalize(features.float(), dim=1, eps=1e-12)
    rows = max(1, PAIRS // size)
    if size <= rows:
        likelihoods = _likelihoods(normalised, labels, 0, size, temperature, divisor, ignored)
    else:
        parts = [
            checkpoint(
                _likelihoods,
                *(normalised, labels, begin, min(begin + rows, size), temperature, divisor, ignored),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for begin in range(0, size, rows)
        ]
        likelihoods = torch.cat(parts)
    if ignored is None:
        return -likelihoods.mean()
    return -likelihoods.sum() / (labels != ignored).sum().clamp(min=1)


def _likelihoods(
    normalised: torch.Tensor,
    labels: torch.Tensor,
    begin: int,
    end: int,
    temperature: float,
    divisor: str,
    ignored: int | None,
) -> torch.Tensor:
    """What the anchors ``begin`` to ``end`` of `supcon` contribute to the sum, ``(end - begin,)``."""
    others = torch.arange(len(labels), device=labels.device)
    similarity = normalised[begin:end] @ normalised.T / temperature
    outside = others[begin:end, None] == others[None, :]
    if ignored is not None:
        outside |= labels == ignored
    positive = (labels[begin:end, None] == labels[None, :]) & ~outside
    count = positive.sum(dim=1)
    # Not infinite: where nothing else is left, that would be 0 times infinity.
    normaliser = similarity.masked_fill(outside, torch.finfo(similarity.dtype).min).logsumexp(dim=1)
    log_likelihood = (similarity * positive).sum(dim=1) - count * normaliser
    weight = count + 1 if divisor == "all" else count.clamp(min=1)
    return log_likelihood / weight


def similarity_matching(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Squared distance between the similarities of the features and those of the labels, a float32 scalar.

    Similarity is the correlation of two samples' feature vectors, clamped to [-1, 1]; the labels' vectors are one-hot
    (Nokland and Eidnes, arXiv 1901.06656, "sim"). Of images, the vector holds the deviation of each channel over the
    pixels, if there are more than three channels and pixels enough. Features are ``(N, D)`` or ``(N, C, H, W)``, labels
    ``(N,)``.
    """
    features = features.float()
    if features.dim() == 4 and features.shape[1] > 3 and features.shape[2] > 1:
        features = features.flatten(2).std(dim=2)
    wanted = _correlations(functional.one_hot(labels, classes).float())
    return functional.mse_loss(_correlations(features.flatten(1)), wanted)


def deinforeg(features: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """The three terms of decoupled information regularisation (arXiv 2506.18193), float32 scalars with weights 1.

    Of features scaled to length 1: ``covariance``, the squared covariances between different features summed and
    divided by D; ``invariance``, see `similarity_matching`; ``variance``, how far the deviation of a feature over the
    batch lies below 1, averaged over the features and, as in the published code, divided by N. Features are ``(N, D)``,
    labels ``(N,)``; with fewer than two samples all terms are 0.
    """
    size, width = features.shape
    if size < 2:
        nothing = features.float().sum() * 0.0
        return {"covariance": nothing, "invariance": nothing, "variance": nothing}
    normalised = functional.normalize(features.float(), dim=1)
    centred = normalised - normalised.mean(dim=0)
    covariances = centred.T @ centred / size
    between = covariances.square().sum() - covariances.diagonal().square().sum()
    deviation = (centred.var(dim=0) + 1e-7).sqrt()
    return {
        "covariance": between / width,
        "invariance": similarity_matching(normalised, labels, classes),
        "variance": functional.relu(1 - deviation).mean() / size,
    }


def _correlations(vectors: torch.Tensor) -> torch.Tensor:
    """``(N, N)`` correlations between the rows of ``(N, D)``."""
    centred = functional.normalize(vectors - vectors.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    return (centred @ centred.T).clamp(-1, 1)
