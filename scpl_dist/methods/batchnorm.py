"""BatchNorm where a batch is cut into parts: into micro-batches in time, or into the replicas' parts in space.

deferred  micro-batches: each is still normalised by its own mean and variance, and the running averages move once a
          batch, by the statistics of all its micro-batches. Only what is kept for inference becomes that of
          back-propagation on whole batches, as if its activations had been the same.
shared    replicas: all normalise by the mean and variance of the whole micro-batch, so the result is that of one
          worker. (torch's SyncBatchNorm does the same, on GPUs only.)

A module in use changes its class, as torch's lazy modules do: parameters, buffers, hooks and names stay, so checkpoints
are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

# Makes of statistics (1, W) those of all (replicas, W), differentiably: it adds up the gradients of all replicas.
Gather = Callable[[Tensor], Tensor]


class _Exchanged(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: the module has been traced as what it was, and that checks."""

    def _move(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running averages by the statistics of so many numbers, as BatchNorm does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), share)


class DeferredBatchNorm(_Exchanged):
    # Sums over the present batch: buffers that no checkpoint keeps, as they are empty between batches.
    total: Tensor
    squares: Tensor
    count: Tensor
    begun: bool  # something has been added to them

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.running_mean is None:
            return super().forward(input)
        others = [dim for dim in range(input.dim()) if dim != 1]
        values = input if input.dtype is torch.float64 else input.float()
        self.begun = True
        with torch.no_grad():
            self.total += values.sum(others)
            self.squares += values.square().sum(others)
            self.count += input.numel() / input.shape[1]
        return functional.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running averages as BatchNorm does after a forward pass of the whole batch."""
        if not self.begun:
            return
        mean = self.total / self.count
        self._move(mean, self.squares / self.count - mean.square(), self.count)
        self._begin()

    def _begin(self) -> None:
        self.begun = False
        for sums in (self.total, self.squares, self.count):
            sums.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        """A batch that another state was put in place of has left nothing behind."""
        super()._load_from_state_dict(*args)
        self._begin()


class SharedBatchNorm(_Exchanged):
    gather: Gather

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        values = input if input.dtype is torch.float64 else input.float()
        width = input.shape[1]
        others = [dim for dim in range(input.dim()) if dim != 1]
        column = (1, width, *[1] * (input.dim() - 2))
        own = values.mean(others)
        spread = (values - own.view(column)).square().sum(others)
        count = own.new_full((1,), input.numel() / width)
        gathered = self.gather(torch.cat([own, spread, count])[None])
        # Means and squared deviations of parts combine without the cancellation that sums of squares suffer.
        means, spreads, counts = torch.split(gathered, [width, width, 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (spreads.sum(0) + (counts * (means - mean).square()).sum(0)) / total
        if self.training and self.running_mean is not None:
            with torch.no_grad():
                self._move(mean, variance, total)
        output: Tensor = (values - mean.view(column)) * (variance + self.eps).rsqrt().view(column)
        if self.affine:
            output = output * self.weight.view(column) + self.bias.view(column)
        return output.to(input.dtype)


def defer(module: nn.Module) -> None:
    """Let every BatchNorm of a module move its running averages in `commit` only."""
    for norm in _plain(module):
        if norm.track_running_stats:
            norm.__class__ = DeferredBatchNorm
            norm.begun = False  # type: ignore[assignment]  # a module's attributes
            for name, shape in (("total", norm.num_features), ("squares", norm.num_features), ("count", ())):
                norm.register_buffer(name, torch.zeros(shape), persistent=False)


def share(module: nn.Module, gather: Gather) -> None:
    """Let every BatchNorm of a module take the statistics of all replicas' samples."""
    for norm in _plain(module):
        norm.__class__ = SharedBatchNorm
        norm.gather = gather  # type: ignore[assignment]  # a module's attributes


def _plain(module: nn.Module) -> list[_BatchNorm]:
    return [
        norm for norm in module.modules() if isinstance(norm, _BatchNorm) and not isinstance(norm, _Exchanged)
    ]


def commit(module: nn.Module) -> None:
    """`DeferredBatchNorm.commit` for all in a module."""
    for child in module.modules():
        if isinstance(child, DeferredBatchNorm):
            child.commit()
