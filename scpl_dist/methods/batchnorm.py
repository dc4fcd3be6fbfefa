"""BatchNorm where a batch is cut into parts: into micro-batches in time, or into the replicas' parts in space.

deferred  micro-batches: each is still normalised by its own mean and variance, and the running averages move once a
          batch, by the statistics of all its micro-batches. Only what is kept for inference becomes that of
          back-propagation on whole batches, as if its activations had been the same.
shared    replicas: all normalise by the mean and variance of the whole micro-batch, so the result is that of one
          worker. (torch's SyncBatchNorm does the same, on GPUs only.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class _Exchanged(_BatchNorm):
    """Takes the place of a BatchNorm: the same parameters, buffers, hooks and names, so checkpoints are the same."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine = norm.affine
        self.track_running_stats = norm.track_running_stats
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        for name, value in vars(norm).items():
            if "_hook" in name:  # shared, so that the handle which removes a hook still does
                setattr(self, name, value)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs (batch, channels, ...), got {tuple(input.shape)}")

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running averages."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class DeferredBatchNorm(_Exchanged):
    """See the module.

    The sums over the present batch are buffers that no checkpoint keeps: they are empty between batches.
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm)
        for name in ("total", "squares"):
            self.register_buffer(name, torch.zeros(self.num_features), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

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
        if self.count == 0:
            return
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        self._move(mean, variance * (self.count / (self.count - 1).clamp(min=1)))
        for sums in (self.total, self.squares, self.count):
            sums.zero_()


Gather = Callable[[Tensor], Tensor]


class SharedBatchNorm(_Exchanged):
    """See the module.

    ``gather`` makes of the statistics (1, W) of this replica those of all (replicas, W); it is differentiable, and adds
    up the gradients of all replicas.
    """

    def __init__(self, norm: _BatchNorm, gather: Gather) -> None:
        super().__init__(norm)
        self.gather = gather

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)``; in training by the statistics of all replicas' samples."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
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
                self._move(mean, variance * (total / (total - 1).clamp(min=1)))
        output: Tensor = (values - mean.view(column)) * (variance + self.eps).rsqrt().view(column)
        if self.affine:
            output = output * self.weight.view(column) + self.bias.view(column)
        return output.to(input.dtype)


def deferred(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm in it deferred; parameters and buffers are shared, names stay."""
    return _exchanged(module, lambda norm: DeferredBatchNorm(norm) if norm.track_running_stats else norm)


def shared(module: nn.Module, gather: Gather) -> nn.Module:
    """The module with every BatchNorm in it shared; likewise."""
    return _exchanged(module, lambda norm: SharedBatchNorm(norm, gather))


def _exchanged(module: nn.Module, exchange: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Each one is exchanged once, and one that has several names keeps all of them."""
    made: dict[nn.Module, nn.Module] = {
        norm: exchange(norm)
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, _Exchanged)
    }
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if name and child in made:
            module.set_submodule(name, made[child])
    return made.get(module, module)


def commit(module: nn.Module) -> None:
    """`DeferredBatchNorm.commit` for all in a module."""
    for child in module.modules():
        if isinstance(child, DeferredBatchNorm):
            child.commit()
