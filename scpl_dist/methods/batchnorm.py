"""BatchNorm whose running averages move once a batch, by the statistics of all its micro-batches.

A micro-batch is still normalised by its own mean and variance. Only what is kept for inference becomes that of
back-propagation on whole batches, as if its activations had been the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["DeferredBatchNorm", "commit", "deferred"]


class DeferredBatchNorm(_BatchNorm):
    """See the module. State and parameters have BatchNorm's names, so checkpoints and exports are the same.

    The sums over the present batch are buffers that no checkpoint keeps: they are empty between batches.
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in norm.__dict__.items() if not key.startswith("_")})
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name in ("total", "squares"):
            self.register_buffer(name, torch.zeros(self.num_features), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs (batch, channels, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)``; in training by the statistics of this micro-batch."""
        if not self.training or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        others = [dim for dim in range(input.dim()) if dim != 1]
        with torch.no_grad():
            self.total += input.sum(others)
            self.squares += input.square().sum(others)
            self.count += input.numel() / input.shape[1]
        return functional.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running averages as BatchNorm does after a forward pass of the whole batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if self.count == 0:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()) * (self.count / (self.count - 1).clamp(min=1))
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
        for sums in (self.total, self.squares, self.count):
            sums.zero_()


def deferred(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm in it replaced; parameters and buffers are shared, names stay."""
    if isinstance(module, _BatchNorm) and not isinstance(module, DeferredBatchNorm):
        return DeferredBatchNorm(module) if module.track_running_stats else module
    for name, child in module.named_children():
        setattr(module, name, deferred(child))
    return module


def commit(module: nn.Module) -> None:
    """`DeferredBatchNorm.commit` for all in a module."""
    for child in module.modules():
        if isinstance(child, DeferredBatchNorm):
            child.commit()
