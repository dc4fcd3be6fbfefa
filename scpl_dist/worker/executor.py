"""The executor: carries out the actions of one stage, item by item, for every method alike.

    item     from the coordinator (stage 0) or in-band from the stage before
    marker   passed on first, then acted upon: evaluation, checkpoint, epoch end and stop reach every stage after all
             micro-batches before them, so nothing has to be drained

What a stage computes depends on the items, the seed and its blocks alone. That is why the number of stages does not
change a bit of the result.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from scpl_dist.control.items import Checkpoint, Computed, Item, Marker, Stop, Train, from_plain, to_plain
from scpl_dist.control.messages import Done, Stats
from scpl_dist.data.loader import Batch, Loader
from scpl_dist.methods import Method
from scpl_dist.methods.block import Carry, detached, floating, seed_operators
from scpl_dist.methods.lowering import lower
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.run.errors import NonFiniteLoss
from scpl_dist.run.phases import Phase
from scpl_dist.storage import checkpoints
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport import Envelope
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.tensors import to_device
from scpl_dist.worker.microbatch import ItemInProgress, MicroBatch
from scpl_dist.worker.replicas import Replicas, Sum
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

Report = Callable[[Done], None]


@dataclass(frozen=True, kw_only=True)
class Context:
    """The worker around an executor.

    Attributes:
        device: where the stage computes.
        timer: takes the times.
        report: called with a ``done`` message after every item.
        run_dir: run folder for checkpoints.
        loader: batches; None on all stages but the first.
        writer: writes checkpoints; None where none are asked for, and on all replicas of a stage but the first.
        replicas: the other workers of this stage; None if there are none.
    """

    device: torch.device
    timer: PhaseTimer
    report: Report
    run_dir: Path
    loader: Loader[Item] | None = None
    writer: CheckpointWriter | None = None
    replicas: Replicas | None = None


class Executor:
    """One stage of the pipeline.

    Args:
        spec: where the stage stands and which blocks it holds.
        method: the training method.
        updaters: of the stage's blocks, by block number, on the context's device.
        links: to the neighbours, connected; not used with one stage.
        context: the worker.
    """

    def __init__(
        self,
        spec: StageSpec,
        method: Method,
        updaters: dict[int, Updater],
        links: Neighbours,
        context: Context,
    ) -> None:
        self.spec = spec
        self.method = method
        self.updaters = updaters
        self.trainables = {block: updater.trainable for block, updater in updaters.items()}
        self.links = links
        self.seed = method.config.run.seed
        self.device = context.device
        self.timer = context.timer
        self.report = context.report
        self.run_dir = context.run_dir
        self.loader = context.loader
        self.writer = context.writer
        self.replicas = context.replicas
        self.replica = 0 if context.replicas is None else context.replicas.replica
        self._programs: dict[tuple[bool, int], tuple[Action, ...]] = {}
        self._training: bool | None = None
        self._sums: dict[int, Sum] = {}
        self._handlers: dict[Kind, Callable[[ItemInProgress, Action], None]] = {
            Kind.LOAD: self._load,
            Kind.RECV_F: self._receive_forward,
            Kind.FORWARD: self._forward,
            Kind.ROOM_F: self._wait_forward,
            Kind.SEND_F: self._send_forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.GATHER: self._gather,
            Kind.LOSS: self._loss,
            Kind.BACKWARD: self._backward,
            Kind.ROOM_B: self._wait_backward,
            Kind.SEND_B: self._send_backward,
            Kind.RECV_B: self._receive_backward,
            Kind.SUM: self._sum,
            Kind.STEP: self._step,
            Kind.PREDICT: self._predict,
            Kind.DECODE: self._decode,
            Kind.COUNT: self._count,
        }

    def run(self) -> None:
        """Handle items until the stop marker.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
            Aborted: the run was ended from outside.
            PeerLost: a neighbour is gone.
        """
        while True:
            item, batches, received = self._next()
            self.timer.begin(item)
            details: dict[str, Any] = {}
            if isinstance(item, Computed):
                details = self._compute(item, batches, received)
            else:
                self._pass_on(item)
                if isinstance(item, Checkpoint):
                    self._checkpoint(item)
                elif isinstance(item, Stop) and self.writer is not None:
                    self.timer.enter(Phase.CHECKPOINT)
                    self.writer.drain()
            self.report(Done(sequence=item.sequence, stats=self.stats(), **details))
            if isinstance(item, Stop):
                self.timer.enter(Phase.IDLE)
                return

    def stats(self) -> Stats:
        """Cumulative figures of this stage."""
        transport = self.links.transport
        return self.timer.stats(
            queue=transport.queued() if self.loader is None else self.loader.queued(),
            bytes_sent=transport.bytes_sent,
            bytes_received=transport.bytes_received,
            peak_memory=peak_memory(self.device),
        )

    # Items ------------------------------------------------------------------------------------------------------

    def _next(self) -> tuple[Item, Iterator[Batch], Envelope | None]:
        self.timer.enter(Phase.RECEIVE)
        if self.loader is not None:
            item, batches = self.loader.next()
            return item, batches, None
        message = self.links.next()
        return from_plain(message.item), iter(()), message

    def _pass_on(self, marker: Marker) -> None:
        if not self.spec.last:
            self.timer.enter(Phase.ROOM)
            self.links.wait_for_room(self.spec.stage + 1)
            self.timer.enter(Phase.SEND)
            self.links.pass_on(to_plain(marker))

    def _compute(self, item: Computed, batches: Iterator[Batch], received: Envelope | None) -> dict[str, Any]:
        training = isinstance(item, Train)
        if training is not self._training:
            self._training = training
            for trainable in self.trainables.values():
                trainable.train(training)
        work = ItemInProgress(item, batches, received, training)
        program = self._program(training, len(work.sizes))
        work.again = {action.block for action in program if action.kind is Kind.RECOMPUTE}
        with torch.set_grad_enabled(training):
            for action in program:
                if action.micro_batch is not None:
                    self.timer.micro_batch = action.micro_batch
                self.timer.block = action.block
                self._handlers[action.kind](work, action)
        self.timer.block = None
        if training:
            return {"losses": work.losses}
        if "accuracy" not in work.metrics:
            return {}
        correct, total = work.metrics["accuracy"]  # the control plane knows this one
        return {"correct": int(correct.item()), "total": total}

    def _program(self, training: bool, micro_batches: int) -> tuple[Action, ...]:
        key = (training, micro_batches)
        if key not in self._programs:
            actions = self.method.train if training else self.method.evaluate
            self._programs[key] = lower(actions(self.spec, micro_batches), self.spec)
        return self._programs[key]

    def _checkpoint(self, item: Checkpoint) -> None:
        """Copy the state as it is here in the stream; the writer reports when it is on disk."""
        self.timer.enter(Phase.CHECKPOINT)
        if self.writer is None:
            return
        folder = checkpoints.folder_for(self.run_dir, item.step, item.unique)
        state = {block: updater.state_dict() for block, updater in self.updaters.items()}
        self.writer.submit(item.sequence, item.step, folder, state)

    # Actions ----------------------------------------------------------------------------------------------------

    def _load(self, work: ItemInProgress, action: Action) -> None:
        self.timer.enter(Phase.DATA)
        inputs, labels = next(work.batches)
        assert labels.shape[1:] == self.method.task.label_shape
        if self.device.type != "cpu":
            inputs, labels = to_device((inputs, labels), self.device)
        self._start(work, action, self.method.carry(inputs, labels), labels)

    def _receive_forward(self, work: ItemInProgress, action: Action) -> None:
        assert action.micro_batch is not None
        self.timer.enter(Phase.RECEIVE)
        first, work.received = work.received, None
        carry, labels = self.links.receive(
            self.spec.stage - 1, work.plain, action.micro_batch, work.sizes[action.micro_batch], first
        )
        self._start(work, action, carry, labels)

    def _start(self, work: ItemInProgress, action: Action, carry: Carry, labels: Tensor) -> None:
        assert action.micro_batch is not None
        weight = work.sizes[action.micro_batch] / sum(work.sizes)
        work.flows[action.micro_batch] = MicroBatch(carry, labels, weight)

    def _forward(self, work: ItemInProgress, action: Action) -> None:
        flow, block, micro_batch = work.flow(action)
        self.timer.enter(Phase.FORWARD if work.training else Phase.EVALUATE)
        before = flow.carry
        if work.training:
            # Every block's input is a leaf of its own graph, also inside a stage: gradients are summed in the same
            # order wherever the stages begin.
            flow.before[block] = before = self._leaves(before, block)
            self._seed_operators(work, block, micro_batch)
        with torch.set_grad_enabled(work.training and block not in work.again):
            after = self.trainables[block](before)
        if work.training and block not in work.again:
            flow.after[block] = after
        flow.carry = detached(after)

    def _seed_operators(self, work: ItemInProgress, block: int, micro_batch: int) -> None:
        seed_operators(self.seed, block, work.train.step, micro_batch, self.replica)

    def _leaves(self, carry: Carry, block: int) -> Carry:
        if self.method.local or block == 0:
            return carry
        return pytree.tree_map_only(
            Tensor, lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), carry
        )

    def _recompute(self, work: ItemInProgress, action: Action) -> None:
        flow, block, micro_batch = work.flow(action)
        self.timer.enter(Phase.FORWARD)
        self._seed_operators(work, block, micro_batch)
        # Running statistics have seen this micro-batch already: let it update copies.
        copies = {name: buffer.clone() for name, buffer in self.trainables[block].named_buffers()}
        flow.after[block] = functional_call(self.trainables[block], copies, (flow.before[block],))

    def _wait_forward(self, work: ItemInProgress, action: Action) -> None:
        self.timer.enter(Phase.ROOM)
        self.links.wait_for_room(self.spec.stage + 1)

    def _send_forward(self, work: ItemInProgress, action: Action) -> None:
        assert action.micro_batch is not None
        flow = work.flows[action.micro_batch]
        self.timer.enter(Phase.SEND)
        size, payload = work.sizes[action.micro_batch], (flow.carry, flow.labels)
        self.links.post(self.spec.stage + 1, work.plain, action.micro_batch, size, payload)

    def _gather(self, work: ItemInProgress, action: Action) -> None:
        flow, block, micro_batch = work.flow(action)
        assert self.replicas is not None
        self.timer.enter(Phase.LOSS)
        seen = self.trainables[block].embed(flow.before[block], flow.after[block])
        flow.seen[block] = self.replicas.gather(seen, flow.labels, work.sizes[micro_batch])

    def _loss(self, work: ItemInProgress, action: Action) -> None:
        flow, block, _ = work.flow(action)
        self.timer.enter(Phase.LOSS)
        trainable = self.trainables[block]
        if block in flow.seen:
            seen, labels = flow.seen.pop(block)
        else:
            seen, labels = trainable.embed(flow.before[block], flow.after[block]), flow.labels
        flow.losses[block] = trainable.loss_terms(seen, labels)

    def _backward(self, work: ItemInProgress, action: Action) -> None:
        flow, block, _ = work.flow(action)
        self.timer.enter(Phase.BACKWARD)
        # The graph is used up here, and so are the tensors that it holds.
        before, after = flow.before.pop(block), flow.after.pop(block)
        terms = flow.losses.pop(block, None)
        if terms is not None:
            total = torch.stack(list(terms.values())).sum()
            self.updaters[block].backward(total if flow.weight == 1.0 else total * flow.weight)
            self._note_losses(work, block, terms, flow.weight)
        else:
            reached = [pair for pair in zip(floating(after), flow.back, strict=True) if pair[0].requires_grad]
            if reached:
                torch.autograd.backward([leaf for leaf, _ in reached], [gradient for _, gradient in reached])
        if self.method.local:
            return
        flow.carry = None  # it shares memory with the outputs, which are not needed any more
        if block > 0:
            flow.back = [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in floating(before)
            ]

    def _note_losses(self, work: ItemInProgress, block: int, terms: dict[str, Tensor], weight: float) -> None:
        noted = work.losses.setdefault(str(block), {})
        for name, term in terms.items():
            value = term.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"loss {name!r} of block {block} is {value}: lower optimizer.lr or check the data; "
                    "the update was not made"
                )
            noted[name] = noted.get(name, 0.0) + weight * value

    def _wait_backward(self, work: ItemInProgress, action: Action) -> None:
        self.timer.enter(Phase.ROOM)
        self.links.wait_for_room(self.spec.stage - 1)

    def _send_backward(self, work: ItemInProgress, action: Action) -> None:
        assert action.micro_batch is not None
        self.timer.enter(Phase.SEND)
        back = work.flows.pop(action.micro_batch).back  # the last that is done with it
        size = work.sizes[action.micro_batch]
        self.links.post(self.spec.stage - 1, work.plain, action.micro_batch, size, back)

    def _receive_backward(self, work: ItemInProgress, action: Action) -> None:
        assert action.micro_batch is not None
        self.timer.enter(Phase.RECEIVE)
        size = work.sizes[action.micro_batch]
        back = self.links.receive(self.spec.stage + 1, work.plain, action.micro_batch, size)
        work.flows[action.micro_batch].back = back

    def _sum(self, work: ItemInProgress, action: Action) -> None:
        assert action.block is not None
        assert self.replicas is not None
        self.timer.enter(Phase.SEND)
        self._sums[action.block] = self.replicas.sum_gradients(self.trainables[action.block].parameters())

    def _step(self, work: ItemInProgress, action: Action) -> None:
        assert action.block is not None
        if action.block in self._sums:
            self.timer.enter(Phase.SYNC)
            self._sums.pop(action.block).finish()
        self.timer.enter(Phase.OPTIMIZER)
        self.updaters[action.block].step(work.train.schedule)

    def _predict(self, work: ItemInProgress, action: Action) -> None:
        flow, block, _ = work.flow(action)
        self.timer.enter(Phase.EVALUATE)
        flow.back = [self.trainables[block].predict(flow.carry)]

    def _decode(self, work: ItemInProgress, action: Action) -> None:
        flow, block, _ = work.flow(action)
        self.timer.enter(Phase.EVALUATE)
        flow.back = [self.trainables[block].decode(flow.back[0])]

    def _count(self, work: ItemInProgress, action: Action) -> None:
        assert action.micro_batch is not None
        flow = work.flows.pop(action.micro_batch)
        self.timer.enter(Phase.EVALUATE)
        for name, (value, count) in self.method.task.metrics(flow.back[0], flow.labels).items():
            before, counted = work.metrics.get(name, (0, 0))
            work.metrics[name] = (before + value, counted + count)


def feed(loader: Loader[Item], items: Iterable[Item]) -> None:
    """Hand items from the coordinator to the loader of stage 0."""
    for item in items:
        if isinstance(item, Computed):
            loader.put(item, item.split, item.epoch, item.micro_batches, isinstance(item, Train))
        else:
            loader.put(item)


def peak_memory(device: torch.device | None = None) -> int:
    """Peak bytes: of the allocator on a GPU, of the whole process on a CPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
