"""In which order, and how often, the samples of the training part are fed: drawn from (seed, epoch) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from scpl_dist.data.source import DataSource
from scpl_dist.run.config import Config
from scpl_dist.run.imports import blaming, load_object
from scpl_dist.run.seeds import derive


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of the training samples in one epoch: ``(size,)`` int64, drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def draws(weights: Tensor, seed: int, epoch: int) -> Tensor:
    """As many positions as there are `weights` ``(N,)``, drawn with replacement: ``(N,)`` int64."""
    generator = torch.Generator().manual_seed(derive(seed, "draws", epoch))
    edges = weights.double().cumsum(0)
    # From below the sum: a number that is rounded up to it would be beyond the last sample.
    numbers = torch.rand(len(weights), generator=generator, dtype=torch.float64) * edges[-1]
    return torch.searchsorted(edges, numbers.clamp(max=edges[-1].nextafter(edges.new_zeros(()))), right=True)


def weights_of(config: Config, source: DataSource) -> Tensor | None:
    """How often each training sample is drawn, in proportion: ``(N,)`` float64 as ``data.sample_weights`` says.

    None if each is fed once an epoch. ValueError if these are no weights for the samples.
    """
    name = config.data.sample_weights
    if not name:
        return None
    labels = source.training_labels()
    if name == "balanced":
        return labels.bincount().double().reciprocal()[labels]
    if ":" not in name:
        raise ValueError(
            f'data.sample_weights = {name!r}: unknown; use "balanced", path/to/file.py:function, or "" to feed each '
            "sample once an epoch"
        )
    function = load_object(name, "data.sample_weights")
    with blaming("data.sample_weights", name):
        given = function(labels)
    where = f"data.sample_weights = {name!r}"
    try:
        weights = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: gave {type(given).__name__}, no weights: {error}") from None
    if weights.shape != labels.shape:
        raise ValueError(
            f"{where}: gave weights of shape {tuple(weights.shape)} for {len(labels)} training samples: "
            "give one weight for each label"
        )
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(f"{where}: weights are finite, not negative, and not all 0")
    return weights
