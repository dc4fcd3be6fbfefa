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
from functools import cache, partial
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
from scpl_dist.methods.block import detached, floating, seed_operators
from scpl_dist.methods.lowering import lower
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.methods.task import plain
from scpl_dist.run.errors import NonFinite
from scpl_dist.run.phases import Phase
from scpl_dist.storage import checkpoints
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport import Envelope
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.tensors import to_device
from scpl_dist.worker.microbatch import ItemInProgress
from scpl_dist.worker.replicas import Replicas, Sum
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater


@dataclass(kw_only=True, eq=False)
class Executor:
    """One stage of the pipeline, and what it works with."""

    spec: StageSpec
    method: Method
    updaters: dict[int, Updater]  # by block, on the device
    neighbours: Neighbours  # connected; not used with one stage
    device: torch.device
    timer: PhaseTimer
    report: Callable[[Done], None]  # called after every item
    run_dir: Path
    loader: Loader[Item] | None = None  # on stage 0
    writer: CheckpointWriter | None = None  # on the first replica of a stage, where checkpoints are written
    replicas: Replicas | None = None

    def __post_init__(self) -> None:
        self.trainables = {block: updater.trainable for block, updater in self.updaters.items()}
        self._program = cache(self._lowered)
        self._training: bool | None = None
        self._sums: dict[int, Sum] = {}
        before, behind = self.spec.stage - 1, self.spec.stage + 1
        # The phase that an action is, and what it does, given the item, the block and the micro-batch.
        self._handlers: dict[Kind, tuple[Phase, Callable[[ItemInProgress, int, int], None]]] = {
            Kind.LOAD: (Phase.DATA, self._load),
            Kind.RECV_F: (Phase.RECEIVE, self._receive_forward),
            Kind.FORWARD: (Phase.FORWARD, self._forward),
            Kind.ROOM_F: (Phase.ROOM, partial(self._wait_for_room, behind)),
            Kind.SEND_F: (Phase.SEND, self._send_forward),
            Kind.RECOMPUTE: (Phase.FORWARD, self._recompute),
            Kind.GATHER: (Phase.LOSS, self._gather),
            Kind.LOSS: (Phase.LOSS, self._loss),
            Kind.BACKWARD: (Phase.BACKWARD, self._backward),
            Kind.ROOM_B: (Phase.ROOM, partial(self._wait_for_room, before)),
            Kind.SEND_B: (Phase.SEND, self._send_backward),
            Kind.RECV_B: (Phase.RECEIVE, self._receive_backward),
            Kind.SUM: (Phase.SEND, self._sum),
            Kind.NORM: (Phase.OPTIMIZER, self._norm),
            Kind.SEND_N: (Phase.SEND, self._send_norms),
            Kind.RECV_N: (Phase.RECEIVE, self._receive_norms),
            Kind.TOTAL: (Phase.OPTIMIZER, self._total),
            Kind.SEND_T: (Phase.SEND, self._send_total),
            Kind.RECV_T: (Phase.RECEIVE, self._receive_total),
            Kind.STEP: (Phase.OPTIMIZER, self._step),
            Kind.PREDICT: (Phase.EVALUATE, self._predict),
            Kind.DECODE: (Phase.EVALUATE, self._decode),
            Kind.COUNT: (Phase.EVALUATE, self._count),
        }

    def run(self) -> None:
        """Handle items until the stop marker; raises NonFinite, PeerLost, or Aborted from outside."""
        while True:
            item, batches, received = self._next()
            self.timer.begin(item)
            details: dict[str, Any] = {}
            if isinstance(item, Computed):
                details = self._compute(ItemInProgress(item, batches, received))
            else:
                self._pass_on(item)
                if isinstance(item, Checkpoint):
                    self._be_ready(training=True)  # what is saved as weights are those that learn
                    self._checkpoint(item)
                elif isinstance(item, Stop) and self.writer is not None:
                    self.timer.enter(Phase.CHECKPOINT)
                    self.writer.drain()
            self.report(Done(sequence=item.sequence, stats=self.stats(), **details))
            if isinstance(item, Stop):
                self.timer.enter(Phase.IDLE)
                return

    def stats(self) -> Stats:
        transport = self.neighbours.transport
        return self.timer.stats(
            queue=transport.queued() if self.loader is None else self.loader.queued(),
            bytes_sent=transport.bytes_sent,
            bytes_received=transport.bytes_received,
            peak_memory=peak_memory(self.device),
        )

    def _next(self) -> tuple[Item, Iterator[Batch], Envelope | None]:
        self.timer.enter(Phase.RECEIVE)
        if self.loader is not None:
            return *self.loader.next(), None
        message = self.neighbours.next()
        return from_plain(message.item), iter(()), message

    def _pass_on(self, marker: Marker) -> None:
        if not self.spec.last:
            self.timer.enter(Phase.ROOM)
            self.neighbours.wait_for_room(self.spec.stage + 1)
            self.timer.enter(Phase.SEND)
            self.neighbours.pass_on(to_plain(marker))

    def _compute(self, work: ItemInProgress) -> dict[str, Any]:
        self._be_ready(work.training)
        updates = work.training and work.train.update
        program = self._program(work.training, len(work.sizes), updates and self.method.clips_together)
        work.again = {action.block for action in program if action.kind is Kind.RECOMPUTE}
        with torch.set_grad_enabled(work.training):
            for action in program:
                self._carry_out(action, work)
        self.timer.block = -1
        if work.training:
            return {"losses": work.losses}
        return {"metrics": plain(work.metrics)}

    def _be_ready(self, training: bool) -> None:
        if training is not self._training:
            self._training = training
            for updater in self.updaters.values():
                updater.train(training)

    def _carry_out(self, action: Action, work: ItemInProgress) -> None:
        phase, handler = self._handlers[action.kind]
        if phase is Phase.FORWARD and not work.training:
            phase = Phase.EVALUATE
        self.timer.block = action.block
        if action.micro_batch >= 0:
            self.timer.micro_batch = action.micro_batch
        self.timer.enter(phase)
        handler(work, action.block, action.micro_batch)

    def _lowered(self, training: bool, micro_batches: int, clip: bool) -> tuple[Action, ...]:
        actions = self.method.train if training else self.method.evaluate
        return lower(actions(self.spec, micro_batches), self.spec, clip)

    def _checkpoint(self, item: Checkpoint) -> None:
        """Copy the state as it is here in the stream; the writer reports when it is on disk."""
        self.timer.enter(Phase.CHECKPOINT)
        if self.writer is not None:
            folder = checkpoints.folder_for(self.run_dir, item.step, item.unique)
            state = {block: updater.state_dict() for block, updater in self.updaters.items()}
            self.writer.submit(item.sequence, item.step, folder, state)

    def _load(self, work: ItemInProgress, block: int, m: int) -> None:
        inputs, labels = next(work.batches)
        assert labels.shape[1:] == self.method.task.label_shape
        if self.device.type != "cpu":
            inputs, labels = to_device((inputs, labels), self.device)
        work.start(m, self.method.carry(inputs, labels), labels)

    def _receive_forward(self, work: ItemInProgress, block: int, m: int) -> None:
        first, work.received = work.received, None
        work.start(m, *self.neighbours.receive(self.spec.stage - 1, work.plain, m, work.sizes[m], first))

    def _forward(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        keeping = work.training and block not in work.again
        if work.training:
            if not self.method.local and block > 0:
                # Every block's input is a leaf of its own graph, also inside a stage: gradients are summed in the same
                # order wherever the stages begin.
                flow.carry = pytree.tree_map_only(Tensor, _leaf, flow.carry)
            flow.before[block] = flow.carry
            self._seed_operators(work, block, m)
        with torch.set_grad_enabled(keeping):
            after = self.trainables[block](flow.carry)
        if keeping:
            flow.after[block] = after
        flow.carry = detached(after)

    def _seed_operators(self, work: ItemInProgress, block: int, m: int) -> None:
        replica = 0 if self.replicas is None else self.replicas.replica
        seed_operators(self.method.config.run.seed, block, work.train.step, m, replica)

    def _recompute(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        self._seed_operators(work, block, m)
        # Running statistics have seen this micro-batch already: let it update copies.
        copies = {name: buffer.clone() for name, buffer in self.trainables[block].named_buffers()}
        flow.after[block] = functional_call(self.trainables[block], copies, (flow.before[block],))

    def _wait_for_room(self, stage: int, work: ItemInProgress, block: int, m: int) -> None:
        self.neighbours.wait_for_room(stage)

    def _send_forward(self, work: ItemInProgress, block: int, m: int) -> None:
        payload = (work.flows[m].carry, work.flows[m].labels)
        self.neighbours.post(self.spec.stage + 1, work.plain, m, work.sizes[m], payload)

    def _gather(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        assert self.replicas is not None
        seen = self.trainables[block].embed(flow.before[block], flow.after[block])
        flow.seen[block] = self.replicas.gather(seen, flow.labels, work.sizes[m])

    def _loss(self, work: ItemInProgress, block: int, m: int) -> None:
        flow, trainable = work.flows[m], self.trainables[block]
        if block in flow.seen:
            flow.losses[block] = trainable.loss_terms(*flow.seen.pop(block))
        else:
            flow.losses[block] = trainable.losses(flow.before[block], flow.after[block], flow.labels)

    def _backward(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        # The graph is used up here, and so are the tensors that it holds.
        before, after = flow.before.pop(block), flow.after.pop(block)
        terms = flow.losses.pop(block, None)
        if terms is not None:
            total = torch.stack(list(terms.values())).sum()
            weight = flow.weight * work.train.share
            self.updaters[block].backward(total if weight == 1.0 else total * weight)
            _note_losses(work, block, terms, flow.weight)
        else:
            reached = [pair for pair in zip(floating(after), flow.back, strict=True) if pair[0].requires_grad]
            if reached:
                torch.autograd.backward([leaf for leaf, _ in reached], [gradient for _, gradient in reached])
        if self.method.local:
            return
        flow.carry = None  # it shares memory with the outputs, which are not needed any more
        if block > 0:
            leaves = floating(before)
            flow.back = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    def _send_backward(self, work: ItemInProgress, block: int, m: int) -> None:
        back = work.flows.pop(m).back  # the last that is done with it
        self.neighbours.post(self.spec.stage - 1, work.plain, m, work.sizes[m], back)

    def _receive_backward(self, work: ItemInProgress, block: int, m: int) -> None:
        work.flows[m].back = self.neighbours.receive(self.spec.stage + 1, work.plain, m, work.sizes[m])

    def _sum(self, work: ItemInProgress, block: int, m: int) -> None:
        assert self.replicas is not None
        self._sums[block] = self.replicas.sum_gradients(self.trainables[block].parameters())

    def _step(self, work: ItemInProgress, block: int, m: int) -> None:
        updater = self.updaters[block]
        if block in self._sums:
            self._sums.pop(block).finish()
        if work.train.update:
            updater.step(work.train.schedule, work.norm)
            return
        updater.trainable.updated()
        if self.replicas is not None and self.replicas.replica > 0:
            updater.drop_gradients()  # the first replica holds the sum, and brings it into the next one

    def _norm(self, work: ItemInProgress, block: int, m: int) -> None:
        square = self.updaters[block].norm().to(self.device, torch.float64).square()[None]
        work.squares = square if work.squares is None else torch.cat([square, work.squares])

    def _send_norms(self, work: ItemInProgress, block: int, m: int) -> None:
        self.neighbours.post(self.spec.stage - 1, work.plain, 0, 1, work.squares)

    def _receive_norms(self, work: ItemInProgress, block: int, m: int) -> None:
        work.squares = self.neighbours.receive(self.spec.stage + 1, work.plain, 0, 1)

    def _total(self, work: ItemInProgress, block: int, m: int) -> None:
        assert work.squares is not None
        work.norm = work.squares.sum().sqrt().float()

    def _send_total(self, work: ItemInProgress, block: int, m: int) -> None:
        assert work.norm is not None
        wide = work.norm.double()[None]  # which no wire makes narrow
        self.neighbours.post(self.spec.stage + 1, work.plain, 0, 1, wide)

    def _receive_total(self, work: ItemInProgress, block: int, m: int) -> None:
        work.norm = self.neighbours.receive(self.spec.stage - 1, work.plain, 0, 1)[0].float()

    def _predict(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        flow.back = [self.trainables[block].predict(flow.carry)]

    def _decode(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        flow.back = [self.trainables[block].decode(flow.back[0])]

    def _count(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows.pop(m)
        assert not work.metrics  # an evaluation's batch is never cut
        work.metrics = self.method.metrics(flow.back[0], flow.labels)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _note_losses(work: ItemInProgress, block: int, terms: dict[str, Tensor], weight: float) -> None:
    noted = work.losses.setdefault(str(block), {})
    for name, term in terms.items():
        value = term.item()
        if not math.isfinite(value):
            raise NonFinite(
                f"loss {name!r} of block {block} is {value}: lower optimizer.lr or check the data; "
                "the update was not made"
            )
        noted[name] = noted.get(name, 0.0) + weight * value


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
