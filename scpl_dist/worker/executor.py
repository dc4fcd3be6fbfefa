"""The executor: carries out the actions of one stage, item by item, for every method alike.

    item     from the coordinator (stage 0) or in-band from the stage before
    marker   passed on first, then acted upon: evaluation, checkpoint, epoch end and stop reach every stage after all
             micro-batches before them, so nothing has to be drained

What a stage computes depends on the items, the seed and its blocks alone. That is why the number of stages does not
change a bit of the result.
"""

from __future__ import annotations

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
from scpl_dist.methods.block import Carry, detached, floating, seed_operators
from scpl_dist.methods.lowering import NONE, first_learning, lower
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.methods.task import plain
from scpl_dist.run.phases import Phase
from scpl_dist.storage import checkpoints
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport import Envelope
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.tensors import to_device
from scpl_dist.worker.losses import DELAY, Losses
from scpl_dist.worker.microbatch import ItemInProgress
from scpl_dist.worker.offload import Offload
from scpl_dist.worker.replicas import Replicas, Sum
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater


@dataclass(kw_only=True, eq=False)
class Executor:
    """One stage of the pipeline, and what it works with."""

    spec: StageSpec
    method: Method
    updaters: dict[int, Updater]  # by block, on the device
    neighbours: Neighbours  # connected; with one stage nothing is sent
    device: torch.device
    timer: PhaseTimer
    report: Callable[[Done], None]  # called after every item
    run_dir: Path
    loader: Loader[Item] | None = None  # on stage 0
    writer: CheckpointWriter | None = None  # on the first replica of a stage, where checkpoints are written
    replicas: Replicas | None = None
    offload: Offload | None = None  # that has the blocks; None if all of them are on the device
    delay: int | None = None  # items after which losses are read; None is what suits the device

    def __post_init__(self) -> None:
        delay = self.delay if self.delay is not None else 0 if self.device.type == "cpu" else DELAY
        self._losses = Losses(self.device, delay)
        # Batches are copied to a GPU on a stream of their own: the next one while this one is computed.
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: list[Any] = []  # of the present item
        self._peak_memory = 0
        self.trainables = {block: updater.trainable for block, updater in self.updaters.items()}
        self._program = cache(self._lowered)
        self._modes: dict[int, bool] = {}  # by block: whether it learns or answers
        self._ended: Exception | None = None
        self._sums: dict[int, Sum] = {}
        before, behind = self.spec.stage - 1, self.spec.stage + 1
        # The phase that an action is, and what it does, given the item, the block and the micro-batch.
        self._handlers: dict[Kind, tuple[Phase, Callable[[ItemInProgress, int, int], None]]] = {
            Kind.LOAD: (Phase.DATA, self._load),
            Kind.RECV_F: (Phase.RECEIVE, self._receive_forward),
            Kind.FORWARD: (Phase.FORWARD, self._forward),
            Kind.ROOM_F: (Phase.ROOM, partial(self._wait_for_room, behind)),
            Kind.SEND_F: (Phase.SEND, self._send_forward),
            Kind.EMBED: (Phase.LOSS, self._embed),
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
            Kind.FETCH: (Phase.OFFLOAD, self._fetch),
            Kind.HAVE: (Phase.OFFLOAD, self._have),
            Kind.PUT: (Phase.OFFLOAD, self._put),
        }

    def run(self) -> None:
        """Handle items until the stop marker; raises NonFinite, PeerLost, or Aborted from outside."""
        while True:
            item, batches, received = self._next()
            self.timer.begin(item)
            if not isinstance(item, Train):
                self._report(at_once=True)  # nothing that a spoilt loss went into is saved or answers
            details: dict[str, Any] = {}
            if isinstance(item, Computed):
                details = self._compute(ItemInProgress(item, batches, received))
            else:
                self._pass_on(item)
                if isinstance(item, Checkpoint):
                    self._checkpoint(item)
                elif isinstance(item, Stop) and self.writer is not None:
                    self.timer.enter(Phase.CHECKPOINT)
                    self.writer.drain()
            step = isinstance(item, Train)
            done = Done(sequence=item.sequence, stats=self.stats(memory=not step), **details)
            self._losses.put(done, [*self.neighbours.transport.lent(), *self._copied])
            self._copied = []
            self._report(at_once=not step)
            if isinstance(item, Stop):
                self.timer.enter(Phase.IDLE)
                return

    def abort(self, error: Exception) -> None:
        """End the work on the present item with this error, at its next action. May be called from any thread."""
        self._ended = error

    def stats(self, memory: bool = True) -> Stats:
        """Counters so far; without `memory` its peak is what it was last: to ask for it takes long."""
        if memory:
            self._peak_memory = peak_memory(self.device)
        transport = self.neighbours.transport
        return self.timer.stats(
            queue=self._queued(),
            bytes_sent=transport.bytes_sent,
            bytes_to={str(rank): count for rank, count in dict(transport.bytes_to).items()},
            bytes_received=transport.bytes_received,
            peak_memory=self._peak_memory,
        )

    def _report(self, at_once: bool) -> None:
        for done in self._losses.read(at_once):
            self.report(done)

    def _queued(self) -> int:
        return self.neighbours.transport.queued() if self.loader is None else self.loader.queued()

    def _next(self) -> tuple[Item, Iterator[Batch], Envelope | None]:
        if not self._queued():  # nothing to do, and the next item may wait for such a report
            self._report(at_once=True)
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
        frozen = work.frozen = self.method.config.frozen(work.item.epoch) if work.training else NONE
        if self.offload is None:
            for block in self.updaters:
                self._be_ready(block, work.training, frozen)
        updates = work.training and work.train.update
        program = self._program(
            work.training, len(work.sizes), updates and self.method.clips_together, frozen
        )
        work.again = {action.block for action in program if action.kind is Kind.RECOMPUTE}
        work.passed = set(frozen) - {action.block for action in program if action.kind is Kind.BACKWARD}
        work.first = first_learning(frozen)
        with torch.set_grad_enabled(work.training):
            for action in program:
                if self._ended is not None:
                    raise self._ended
                self._carry_out(action, work)
        self.timer.block = -1
        return {} if work.training else {"metrics": plain(work.metrics)}

    def _be_ready(self, block: int, training: bool, frozen: frozenset[int] = NONE) -> bool:
        """Let a block learn, or not any more, or answer; whether that changed what it has in memory."""
        updater, changed = self.updaters[block], False
        if block in frozen and not updater.frozen:
            updater.freeze()
            changed = True
        if self._modes.get(block) is not training:
            self._modes[block] = training
            changed |= updater.train(training)
        return changed

    def _carry_out(self, action: Action, work: ItemInProgress) -> None:
        phase, handler = self._handlers[action.kind]
        if phase is Phase.FORWARD and not work.training:
            phase = Phase.EVALUATE
        self.timer.block = action.block
        if action.micro_batch >= 0:
            self.timer.micro_batch = action.micro_batch
        self.timer.enter(phase)
        handler(work, action.block, action.micro_batch)

    def _lowered(
        self, training: bool, micro_batches: int, clip: bool, frozen: frozenset[int]
    ) -> tuple[Action, ...]:
        actions = self.method.train if training else self.method.evaluate
        program = actions(self.spec, micro_batches)
        return lower(program, self.spec, clip, frozen, self.method.local, self.offload is not None)

    def _checkpoint(self, item: Checkpoint) -> None:
        """Have the state saved as it is here in the stream; the writer reports when it is on disk."""
        self.timer.enter(Phase.CHECKPOINT)
        if self.offload is None:
            for block in self.updaters:
                self._be_ready(block, training=True)  # what is saved as weights are those that learn
        if self.writer is None:
            return
        folder = checkpoints.folder_for(self.run_dir, item.step, item.unique)
        if self.offload is None:
            state = {block: updater.state_dict() for block, updater in self.updaters.items()}
            self.writer.submit(item.sequence, item.step, folder, state)
        else:
            self.writer.write(item.sequence, item.step, folder, self._fetched(self.offload))

    def _fetched(self, offload: Offload) -> Iterator[tuple[int, dict[str, Any]]]:
        """The state of one block after the other, as `_checkpoint`, each on the device while it is looked at."""
        for block, updater in self.updaters.items():
            # By this the coordinator knows that it goes on, however long it takes.
            self.timer.micro_batch = block
            offload.have(block)
            if self._be_ready(block, training=True):
                offload.change(block)
            yield block, updater.state_dict()
            offload.put(block)

    def _load(self, work: ItemInProgress, block: int, m: int) -> None:
        if m == 0 and self._by_tokens(work):
            work.weigh(self.method.task.counted)
        inputs, labels = next(work.batches)
        assert labels.dim() == 1 + self.method.task.label_dimensions
        begin, end = self.neighbours.own(work.sizes[m])
        views = 2 if work.training and self.method.config.data.augmentation == "strong" else 1
        assert len(labels) == views * (end - begin), "samples would be left out, or trained twice"
        if self.device.type != "cpu":
            inputs, labels = self._on_device((inputs, labels))
        work.start(m, self.method.carry(inputs, labels), labels, work.weights[m] if work.weights else None)

    def _on_device(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._copying):  # None changes nothing
            copied: Batch = to_device(batch, self.device)
        if self._copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copying)
            self._copied.append(copied)
        return copied

    def _by_tokens(self, work: ItemInProgress) -> bool:
        """Whether the micro-batches of an item may have unequal numbers of what counts; then weights travel, too."""
        return self.method.task.per_token and len(work.sizes) > 1

    def _receive_forward(self, work: ItemInProgress, block: int, m: int) -> None:
        first, work.received = work.received, None
        came = self.neighbours.receive(self.spec.stage - 1, work.plain, m, work.sizes[m], first)
        carry, labels = came.payload
        work.start(m, carry, labels, came.weight)

    def _forward(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        learning = work.training and block not in work.passed
        keeping = learning and block not in work.again
        if learning:
            if not self.method.local and block > work.first:
                # Every block's input is a leaf of its own graph, also inside a stage: gradients are summed in the same
                # order wherever the stages begin.
                flow.carry = pytree.tree_map_only(Tensor, _leaf, flow.carry)
            flow.before[block] = flow.carry
        if work.training:
            self._seed_operators(work, block, m)
        with torch.set_grad_enabled(keeping):
            after = self.trainables[block](flow.carry)
        if keeping:
            flow.after[block] = after
        flow.carry = detached(after)
        if self.offload is not None:
            flow.carry = self.offload.apart(block, flow.carry)

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
        flow = work.flows[m]
        weight = flow.weight if self._by_tokens(work) else None
        payload = (flow.carry, flow.labels)
        self.neighbours.post(self.spec.stage + 1, work.plain, m, work.sizes[m], payload, weight)

    def _embed(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        with torch.no_grad():
            seen, labels = self._seen(work, block, m, flow.carry)
        flow.seen[block] = pytree.tree_map_only(Tensor, _leaf, seen), labels

    def _seen(self, work: ItemInProgress, block: int, m: int, after: Carry) -> tuple[Any, Tensor]:
        """What the objective sees of a micro-batch, and labels: those of all replicas."""
        flow = work.flows[m]
        seen = self.trainables[block].embed(flow.before[block], after)
        if self.replicas is None:
            return seen, flow.labels
        return self.replicas.gather(seen, flow.labels, work.sizes[m])

    def _gather(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        flow.seen[block] = self._seen(work, block, m, flow.after[block])

    def _loss(self, work: ItemInProgress, block: int, m: int) -> None:
        if m < 0:
            self._loss_of_all(work, block)
            return
        flow, trainable = work.flows[m], self.trainables[block]
        if block in flow.seen:
            flow.losses[block] = trainable.loss_terms(*flow.seen.pop(block))
        else:
            flow.losses[block] = trainable.losses(flow.before[block], flow.after[block], flow.labels)

    def _loss_of_all(self, work: ItemInProgress, block: int) -> None:
        """The objective of all micro-batches, and its gradient with respect to what it sees of each."""
        parts = [flow.seen[block] for flow in work.flows.values()]
        seen, labels = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
        terms = self.trainables[block].loss_terms(seen, labels)
        values = torch.stack(list(terms.values()))
        self.updaters[block].backward(values.sum() * work.train.share)
        self._losses.note(work.train.step, 0, block, tuple(terms), values, 1.0)

    def _backward(self, work: ItemInProgress, block: int, m: int) -> None:
        flow = work.flows[m]
        terms = flow.losses.pop(block, None)
        reached, back = flow.after[block], flow.back
        if block in flow.seen:
            back = _gradients(flow.seen.pop(block)[0])
            reached, _ = self._seen(work, block, m, reached)
        # The graph is used up here, and so are the tensors that it holds.
        before = flow.before.pop(block)
        del flow.after[block]
        if terms is not None:
            values = torch.stack(list(terms.values()))
            total, weight = values.sum(), flow.weight * work.train.share
            self.updaters[block].backward(total if weight == 1.0 else total * weight)
            self._losses.note(work.train.step, m, block, tuple(terms), values, flow.weight)
        else:
            pairs = [pair for pair in zip(floating(reached), back, strict=True) if pair[0].requires_grad]
            if pairs:
                torch.autograd.backward([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        if self.method.local:
            return
        flow.carry = None  # it shares memory with the outputs, which are not needed any more
        if block > work.first:
            flow.back = _gradients(before)

    def _send_backward(self, work: ItemInProgress, block: int, m: int) -> None:
        back = work.flows.pop(m).back  # the last that is done with it
        if work.training:
            back = self._losses.mark(back)
        self.neighbours.post(self.spec.stage - 1, work.plain, m, work.sizes[m], back)

    def _receive_backward(self, work: ItemInProgress, block: int, m: int) -> None:
        back = self.neighbours.receive(self.spec.stage + 1, work.plain, m, work.sizes[m]).payload
        if work.training:
            self._losses.note_mark(work.train.step, m, self.spec.blocks[-1], back)
        work.flows[m].back = back

    def _sum(self, work: ItemInProgress, block: int, m: int) -> None:
        assert self.replicas is not None
        self._sums[block] = self.replicas.sum_gradients(self.trainables[block].parameters())

    def _step(self, work: ItemInProgress, block: int, m: int) -> None:
        updater = self.updaters[block]
        if block in self._sums:
            self._sums.pop(block).finish()
        if work.train.update:
            updater.step(work.train.schedule, work.norm, self._losses.spoilt)
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
        work.squares = self.neighbours.receive(self.spec.stage + 1, work.plain, 0, 1).payload

    def _total(self, work: ItemInProgress, block: int, m: int) -> None:
        assert work.squares is not None
        work.norm = work.squares.sum().sqrt().float()

    def _send_total(self, work: ItemInProgress, block: int, m: int) -> None:
        assert work.norm is not None
        wide = work.norm.double()[None]  # which no wire makes narrow
        self.neighbours.post(self.spec.stage + 1, work.plain, 0, 1, wide)

    def _receive_total(self, work: ItemInProgress, block: int, m: int) -> None:
        work.norm = self.neighbours.receive(self.spec.stage - 1, work.plain, 0, 1).payload[0].float()

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

    def _fetch(self, work: ItemInProgress, block: int, m: int) -> None:
        assert self.offload is not None
        self.offload.fetch(block)

    def _have(self, work: ItemInProgress, block: int, m: int) -> None:
        assert self.offload is not None
        self.offload.have(block)
        if self._be_ready(block, work.training, work.frozen) or (work.training and block not in work.frozen):
            self.offload.change(block)

    def _put(self, work: ItemInProgress, block: int, m: int) -> None:
        assert self.offload is not None
        self.offload.put(block)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _gradients(carry: Carry) -> list[Tensor]:
    leaves = floating(carry)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


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
