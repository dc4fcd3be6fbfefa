"""The replicas of a stage: several workers that hold the same weights and share each micro-batch.

The result is that of one worker with the whole micro-batch, but for the order in which numbers are added:

    replica 0   F(samples 0..3) --.                          .-- B(own rows) --.
                                  |-- all-gather --> loss ---|                 |-- all-reduce (sum) --> STEP
    replica 1   F(samples 4..7) --'   of what it sees        '-- B(own rows) --'   of the gradients

Each computes the loss of all samples, so the gradient with respect to its own rows is complete where it starts, and
the all-gather's backward pass only cuts them out: nothing travels. A gradient of the weights is then the sum over the
replicas. BatchNorm normalises by the statistics of all replicas' samples (`scpl_dist.methods.batchnorm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scpl_dist.methods import batchnorm
from scpl_dist.run.errors import PeerLost
from scpl_dist.run.layout import Layout, WorkerId, share
from scpl_dist.run.phases import Phase
from scpl_dist.transport import Store, rendezvous, select
from scpl_dist.worker.timer import PhaseTimer

_LARGE = 1 << 16  # numbers in a gradient above which a message of its own costs less than a copy


class Replicas:
    """A worker's view of the workers of its stage; the timer is told of waits for the others."""

    def __init__(self, group: Any, layout: Layout, worker_id: WorkerId, timer: PhaseTimer) -> None:
        self._group = group
        self.replica = worker_id.replica
        self._replicas = worker_id.replicas
        self._timer = timer
        # gloo works on CPUs; only replicas that share a GPU have it for tensors of one.
        self._by_cpu = dist.get_backend(group) == "gloo"
        others = [rank for rank in layout.ranks(worker_id.stage) if rank != worker_id.rank]
        self._other = others[0] if len(others) == 1 else None

    @classmethod
    def join(
        cls,
        layout: Layout,
        worker_id: WorkerId,
        endpoints: Sequence[Mapping[str, Any]],
        timer: PhaseTimer,
        store: Store,
        timeout_s: float,
    ) -> Replicas | None:
        """The group of this worker's stage; None if it has no other worker.

        Every worker of the run has to call this, after its transport is connected. Endpoints are those of all workers;
        ``timeout_s`` limits the meeting of all.
        """
        if layout.world == layout.stages:
            return None
        if not dist.is_initialized():
            rank = worker_id.rank
            limit = timedelta(seconds=timeout_s)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world, timeout=limit)
        own = None
        for stage in range(layout.stages):
            ranks = layout.ranks(stage)
            if len(ranks) > 1:
                if select.apart([endpoints[rank] for rank in ranks]):
                    group = rendezvous.nccl_group(ranks)
                else:
                    group = dist.new_group(ranks, backend="gloo", timeout=rendezvous.FOREVER)
                own = group if stage == worker_id.stage else own
        return None if own is None else cls(own, layout, worker_id, timer)

    def gather(self, seen: Any, labels: Tensor, size: int) -> tuple[Any, Tensor]:
        """What all replicas see of a micro-batch of `size` samples, in their order, and their labels.

        Given are those of the own samples: a pytree of tensors, rows first, which gradients reach, and labels.
        """
        parts = [share(size, self._replicas, replica) for replica in range(self._replicas)]
        begin, end = parts[self.replica]
        views = len(labels) // (end - begin)
        counts = [views * (end - begin) for begin, end in parts]
        found: tuple[Any, Tensor] = pytree.tree_map_only(
            Tensor, lambda leaf: _Gather.apply(leaf, self, counts, False), (seen, labels)
        )
        return found

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> Sum:
        """Begin to add up the gradients of all replicas; they must not be touched until the sum is finished."""
        return Sum(self, [parameter for parameter in parameters if parameter.requires_grad])

    def share_statistics(self, module: nn.Module) -> None:
        """Let every BatchNorm of a module take the statistics of all replicas' samples."""
        batchnorm.share(module, lambda own: _Gather.apply(own, self, [1] * self._replicas, True))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in here waits for the others; raises PeerLost if one of them is gone."""
        before = self._timer.phase
        self._timer.enter(Phase.SYNC)
        try:
            yield
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise PeerLost(self._other, lines[0] if lines else type(error).__name__) from error
        self._timer.enter(before)

    def all_gather(self, own: Tensor, counts: list[int]) -> Tensor:
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        padded = padded.cpu() if self._by_cpu else padded
        parts = [torch.empty_like(padded) for _ in counts]
        with self.waiting():
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(own.device)

    def add_up(self, *tensors: Tensor) -> Callable[[], None]:
        """Begin to add up tensors over the replicas, in place; what is returned waits for the sums."""
        travelling = [tensor.cpu() if self._by_cpu else tensor for tensor in tensors]
        with self.waiting():
            works = [dist.all_reduce(tensor, group=self._group, async_op=True) for tensor in travelling]

        def wait() -> None:
            with self.waiting():
                for work in works:
                    work.wait()
            for tensor, arrived in zip(tensors, travelling, strict=True):
                if arrived is not tensor:
                    tensor.copy_(arrived)

        return wait


class Sum:
    """The gradients of some parameters on their way to the sum over all replicas.

    One that no replica has stays away. Large ones travel as they are, small ones together in one message.
    """

    def __init__(self, replicas: Replicas, parameters: list[nn.Parameter]) -> None:
        self._replicas = replicas
        self._parameters = parameters
        self._gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        large = [one for one in self._gradients if one.numel() >= _LARGE and one.is_contiguous()]
        self._small = [one for one in self._gradients if one.numel() < _LARGE or not one.is_contiguous()]
        has = [float(parameter.grad is not None) for parameter in parameters]
        first = torch.tensor(has, device=parameters[0].device if parameters else None)
        self._together = torch.cat([first, *[one.reshape(-1) for one in self._small]])
        self._wait = replicas.add_up(self._together, *large) if parameters else None

    def finish(self) -> None:
        """Wait for the sums, and make them the parameters' gradients; raises PeerLost if a replica is gone."""
        if self._wait is None:
            return
        self._wait()
        sizes = [len(self._parameters), *[one.numel() for one in self._small]]
        exists, *parts = torch.split(self._together, sizes)
        for one, part in zip(self._small, parts, strict=True):
            one.copy_(part.view_as(one))
        with self._replicas.waiting():  # over NCCL only the GPU has waited until here
            somewhere = exists.tolist()
        for parameter, gradient, somebody in zip(self._parameters, self._gradients, somewhere, strict=True):
            parameter.grad = gradient if somebody else None


class _Gather(torch.autograd.Function):
    """All-gather of rows.

    Its backward pass takes the own rows of the gradient. If every replica goes on to the same result, the gradient is
    complete already; where each goes on to a result of its own, it is the sum over the replicas.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, replicas: Replicas, counts: list[int], summed: bool) -> Tensor:
        ctx.replicas, ctx.counts, ctx.summed = replicas, counts, summed
        return replicas.all_gather(own, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.summed:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            ctx.replicas.add_up(gradient)()
        return torch.split(gradient, ctx.counts)[ctx.replicas.replica], None, None, None
