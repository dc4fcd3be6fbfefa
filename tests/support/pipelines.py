"""The real executor on several stages inside one process: a thread a stage, no network.

For questions about one step's gradients. Whole runs use real processes. Dropout draws from a generator that all threads
share, so models with dropout take one stage here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scpl_dist.control.items import Item, Stop, Train
from scpl_dist.control.messages import Done
from scpl_dist.coordinator.item_sequence import split
from scpl_dist.data.loader import Loader
from scpl_dist.data.source import DataSource
from scpl_dist.methods import Method
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.run.config import Config
from scpl_dist.run.errors import Aborted
from scpl_dist.run.layout import Layout
from scpl_dist.transport import Envelope, Store, Transport
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.tensors import describe
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater


class LocalTransport(Transport):
    """Hands messages over to the other workers of this process."""

    def __init__(
        self, rank: int, peers: list[LocalTransport], device: str = "cpu", wire: str = "float32"
    ) -> None:
        super().__init__(
            rank=rank,
            world=len(peers),
            max_in_flight=2,
            device=torch.device(device),
            wire_dtype=getattr(torch, wire),
        )
        self.peers = peers
        self.posted: Counter[int] = Counter()

    def connect(self, store: Store) -> None:
        pass

    def _send(self, target: int, message: Envelope) -> None:
        describe(message.payload)  # raises if it could not travel
        self.peers[target].arrive(self.rank, self.posted[target], message, lambda: self._credit(target))
        self.posted[target] += 1


class _Fixed(DataSource):
    """One batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.classes = int(y.max()) + 1
        self.sizes = {"train": len(y), "validation": len(y), "test": len(y)}
        self.x, self.y = x, y

    def batch(self, split: Any, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


class _Recorder(Updater):
    """Remembers the gradients and changes nothing."""

    def __init__(self, trainable: TrainableBlock, config: Config) -> None:
        super().__init__(trainable, config)
        self.gradients: list[Tensor] = []

    def step(
        self, schedule: Mapping[str, float], norm: Tensor | None = None, spoilt: Tensor | None = None
    ) -> None:
        self.gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable.parameters()
        ]
        self.trainable.zero_grad(set_to_none=True)
        self.trainable.updated()


def run(
    method: Method,
    trainables: dict[int, TrainableBlock],
    held: list[range],
    x: Tensor,
    y: Tensor,
    parts: int = 1,
) -> dict[int, list[Tensor]]:
    """One training step on the whole of `x`.

    Args:
        method: the method.
        trainables: all blocks; their buffers change, their parameters do not.
        held: the blocks of each stage.
        x: inputs, batch first.
        y: labels.
        parts: micro-batches.

    Returns:
        Gradients of every parameter by block, in the order of ``trainable.parameters()``; none of a block that is not
        updated.
    """
    ends: list[LocalTransport] = []
    ends += (LocalTransport(rank, ends) for rank in range(len(held)))
    recorders = {block: _Recorder(trainable, method.config) for block, trainable in trainables.items()}
    errors: list[BaseException] = []

    def stage(number: int) -> None:
        loader: Loader[Item] | None = Loader(_Fixed(x, y), seed=0, workers=0) if number == 0 else None
        if loader is not None:
            batches = split(0, len(y), parts)
            train = Train(sequence=0, step=0, epoch=0, schedule={"lr": 1.0}, micro_batches=batches)
            feed(loader, [train, Stop(sequence=1)])
        spec = StageSpec(number, len(held), held[number])
        mine: dict[int, Updater] = {block: recorders[block] for block in spec.blocks}
        layout = Layout([1] * len(held))
        links = Neighbours(ends[number], layout, layout.workers[number])
        done: list[Done] = []
        executor = Executor(
            spec=spec,
            method=method,
            updaters=mine,
            neighbours=links,
            device=torch.device("cpu"),
            timer=PhaseTimer(),
            report=done.append,
            run_dir=Path("unused"),
            loader=loader,
        )
        try:
            executor.run()
        except BaseException as error:
            errors.append(error)
            for end in ends:
                end.abort(Aborted("another stage failed"))
            raise

    threads = [threading.Thread(target=stage, args=(number,)) for number in range(len(held))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return {block: recorder.gradients for block, recorder in recorders.items()}
