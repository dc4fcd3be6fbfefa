"""The process of one worker: joins the run, builds its blocks, runs the executor, leaves.

    control thread (scpl_dist.control.channel)          training thread (this module)
    hello  ----> coordinator                    loads the data set (stage 0 only)
    start  <---- all workers are there          builds blocks and heads
                                                joins the other workers' transport
    ready  ---->
    go     <---- all workers are ready          Executor.run(): items until the stop marker
    left   ---->
    close  <---- all workers have left          exit 0

Whatever goes wrong is reported to the coordinator, which ends the run; if it has fallen silent, the worker ends
itself. The last thing a worker does is `os._exit`: no library's clean-up can keep a process of a dead run alive.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from scpl_dist import data
from scpl_dist.control import keys, messages
from scpl_dist.control.channel import Channel
from scpl_dist.control.items import Item
from scpl_dist.data import DataSource
from scpl_dist.data.loader import Loader
from scpl_dist.data.sampling import weights_of
from scpl_dist.methods import arithmetic
from scpl_dist.plan.plan import Plan
from scpl_dist.run import network
from scpl_dist.run.config import Config
from scpl_dist.run.errors import Aborted, NonFinite, PeerLost, SetupError
from scpl_dist.run.failures import Cause
from scpl_dist.run.faults import Trap
from scpl_dist.run.phases import Phase
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.parts import read_part
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport import Transport, rendezvous, select, tensors
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.reachability import ReachabilityCheck, Unreached
from scpl_dist.worker.allocator import keep_freed_memory
from scpl_dist.worker.executor import Executor, feed, peak_memory
from scpl_dist.worker.replicas import Replicas
from scpl_dist.worker.stacks import Stacks
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

M = TypeVar("M", bound=messages.Message)
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # errors that come from a disk


class Refused(Aborted):
    """The coordinator does not take this worker."""


class Worker:
    """One worker's process, of a rank in the launch; raises ValueError if an address or a key is not usable.

    The run folder is shared by all stages; None is the path that the coordinator, at ``tcp://host:port``, has.
    """

    def __init__(self, config: Config, run_dir: Path | None, control: str, rank: int) -> None:
        self.config = config
        self.run_dir = run_dir
        self.layout = config.layout
        self.worker_id = self.layout.workers[rank]
        self.name = f"stage {self.worker_id.label}"
        self.device = _device(config)
        if config.runtime.keep_memory:
            keep_freed_memory()
        self.reason = ""  # why `run` did not return 0
        self._trap = Trap("worker", self.worker_id, run_dir) if run_dir else None
        self.timer = PhaseTimer(self._trap)
        self._control = control
        self._keys = keys.load_client(config.control.keys)
        self._messages: queue.SimpleQueue[messages.Message | Exception] = queue.SimpleQueue()
        self._channel: Channel
        self._stacks: Stacks | None = None
        self._transport: Transport | None = None
        self._loader: Loader[Item] | None = None
        self._writer: CheckpointWriter | None = None
        self._executor: Executor | None = None
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", self.layout.world)) == self.layout.world
        coordinator = network.resolve(network.split_endpoint(control)[0], "control.host")
        self._problem: SetupError | None = None
        try:
            interface, address = network.choose_interface(config.runtime.interface, coordinator, alone)
        except ValueError as error:  # the coordinator shall hear it, or all others would wait for this stage
            self._problem = SetupError(str(error))
            interface, address = network.loopback(), "127.0.0.1"
        self._reachability = ReachabilityCheck(address, interface, self.name, str(self.device))
        self._store_listener = socket.create_server((address, 0), backlog=128)

    def run(self) -> int:
        """Everything from hello to close; returns the exit code: 2 if the coordinator refused this worker."""
        if self._trap is not None:
            self._trap.spring("loading", 0)
        self._channel = Channel(
            self._control,
            self._hello(),
            heartbeat=self._heartbeat,
            on_message=self._on_message,
            on_lost=self._abort,
            timeout_s=self.config.runtime.timeout_s,
            keys=self._keys,
            arrival_s=self.config.runtime.first_step_timeout_s,
        )
        # Not before somebody can be asked for a stop: until then a signal ends this process, which tells as much.
        self._channel.connected.wait()
        self._channel.watch_signals(self._on_signal)
        try:
            self._train()
            return 0
        except Aborted as error:
            self.reason = f"{self.name}: {error}"
            print(self.reason, file=sys.stderr)
            self._channel.close(0)  # whatever is queued, nobody waits for it any more
            return 2 if isinstance(error, Refused) else 1
        except Exception as error:  # every failure is reported with its place, whatever it is
            traceback.print_exc()
            report = self._failure(error)
            self.reason = f"{self.name}: {report.message}"
            self._channel.send(report)
            self._await_verdict()
            return 1
        finally:
            self._channel.close()
            if self._transport is not None:
                self._transport.close()

    def _train(self) -> None:
        if self._problem is not None:
            raise self._problem
        source = self._source()
        self.timer.enter(Phase.IDLE)
        start = self._expect(messages.Start)
        self.timer.enter(Phase.STARTING)
        run_dir = self._shared_folder(start)
        timeout_s = self.config.runtime.timeout_s
        self._stacks = Stacks(run_dir / "log" / f"{self.worker_id.file}.stacks", timeout_s)
        self.timer.on_item = self._stacks.rearm
        self._reachability.visit(self.worker_id.rank, start.endpoints, timeout_s / 3)
        self._executor = self._build(start, run_dir, source)
        self.timer.enter(Phase.IDLE)
        self._channel.send(messages.Ready())
        self._expect(messages.Go)
        self._reachability.close()
        self._executor.run()
        self._channel.send(messages.Left())
        self._expect(messages.Close)

    def _source(self) -> DataSource | None:
        """The data set, on stage 0; the other stages need its shapes only, which the coordinator passes on.

        Its loader may fork, which is best done now: there are few threads yet, and no connections to other workers.
        """
        if self.worker_id.stage != 0:
            return None
        self.timer.enter(Phase.DATA)
        source = data.resolve(self.config, None if self.run_dir is None else RunFolder(self.run_dir).labels())
        part = (self.worker_id.replica, self.worker_id.replicas)
        weights = weights_of(self.config, source)
        self._loader = Loader(source, self.config.run.seed, self.config.data.workers, *part, weights=weights)
        example = tensors.describe(source.example(), "the data set")
        if self.worker_id.first:
            counts = data.counts(self.config, source)
            sizes = dict(source.sizes)
            data_set = messages.Dataset(classes=source.classes, sizes=sizes, input=example, counts=counts)
            self._channel.send(messages.Described(data=data_set))
        return source

    def _build(self, start: messages.Start, run_dir: Path, source: DataSource | None) -> Executor:
        """The stage, its weights restored, and connected to the other workers."""
        config, runtime, rank = self.config, self.config.runtime, self.worker_id.rank
        example = tensors.imagine(start.data.input, "meta")
        plan = Plan.plan(config, start.data.classes, example, start.data.counts)
        spec = plan.specs[self.worker_id.stage]
        trainables = plan.trainables(spec.blocks)
        if not start.restore:
            if source is not None:
                source.prepare(trainables[0].block)
            try:
                plan.load_weights(trainables)
            except ValueError as error:  # on this host the file is another one, or absent
                raise SetupError(str(error)) from None
        updaters = {block: Updater(own.to(self.device), config) for block, own in trainables.items()}
        if start.restore:
            for block, updater in updaters.items():
                state = read_part(Path(start.restore), block, self.device, verified=True)
                name = updater.nonfinite(state)
                if name is not None:
                    raise CheckpointError(
                        f"{start.restore}: {name} of block {block} is NaN or infinite, which an earlier version did "
                        "save: move this checkpoint away, and --resume auto takes the one before"
                    )
                if not self.worker_id.first:
                    state.pop("gradients", None)  # the sum over the replicas, which the first one brings in
                try:
                    updater.load_state_dict(state)
                except CheckpointError as error:  # a start from the same one would end here again
                    raise SetupError(str(error)) from error
        store = rendezvous.join(self._store_listener, rank, start.endpoints, runtime.timeout_s)
        transport = select.connectable(config, rank, start.generation, self.device, start.endpoints)
        if self.layout.world > 1:
            transport.connect(store)
        self._transport = transport
        limit = runtime.first_step_timeout_s
        replicas = Replicas.join(self.layout, self.worker_id, start.endpoints, self.timer, store, limit)
        if replicas is not None:
            for trainable in trainables.values():
                replicas.share_statistics(trainable)
        if self.worker_id.first:
            watch = None if self._trap is None else self._trap.spring
            check = functools.partial(_check, updaters)
            self._writer = CheckpointWriter(self._written, self._write_failed, check, watch)
        return Executor(
            spec=spec,
            method=plan.method,
            updaters=updaters,
            neighbours=Neighbours(transport, self.layout, self.worker_id),
            device=self.device,
            timer=self.timer,
            report=self._channel.send,
            run_dir=run_dir,
            loader=self._loader,
            writer=self._writer,
            replicas=replicas,
        )

    def _shared_folder(self, start: messages.Start) -> Path:
        """The run folder, after a look that it is the coordinator's: checkpoints of all stages go into one folder."""
        path = self.run_dir or Path(start.folder)
        deadline = time.monotonic() + 10  # a shared file system may show a new file late on another host
        while True:
            try:
                found = RunFolder.open_for_writing(path).read("run.json") or {}
            except ValueError as error:
                raise SetupError(str(error)) from None
            if found.get("generation") == start.generation:
                return path
            if time.monotonic() >= deadline:
                raise SetupError(
                    f"the run folder {path} on {socket.gethostname()} is not the coordinator's ({start.folder}): "
                    "its run.json is missing or of another run; all hosts need the same folder, on a shared file "
                    "system, because the parts of a checkpoint belong together; give its path with --run-dir"
                )
            time.sleep(0.1)

    def _hello(self) -> messages.Hello:
        gpu = self.device.type == "cuda"
        return messages.Hello(
            protocol=messages.PROTOCOL,
            version=messages.VERSION,
            torch=torch.__version__,
            config=self.config.digest(),
            stage=self.worker_id.stage,
            replica=self.worker_id.replica,
            stages=self.layout.stages,
            rank=self.worker_id.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name(self.device) if gpu else f"cpu ({platform.machine()})",
            endpoint=self._reachability.endpoint | {"store": self._store_listener.getsockname()[1]},
        )

    def _heartbeat(self) -> messages.Heartbeat:
        """Called by the control thread."""
        timer = self.timer
        return messages.Heartbeat(
            phase=timer.phase,
            step=timer.step,
            epoch=timer.epoch,
            micro_batch=timer.micro_batch,
            stats=timer.stats() if self._executor is None else self._executor.stats(),
        )

    def _on_message(self, message: messages.Message) -> None:
        """Called by the control thread."""
        match message:
            case messages.Work(items=items) if self._loader is not None:
                feed(self._loader, items)
            case messages.Abort(reason=reason, stacks=stacks):
                if stacks and self._stacks is not None:
                    self._stacks.write(reason)
                self._abort(reason)
            case messages.Refuse(reason=reason):
                self._abort(reason, Refused)
            case messages.Start() | messages.Go() | messages.Close():
                self._messages.put(message)
            case _:
                pass  # "alive" has done its work by arriving

    def _expect(self, kind: type[M]) -> M:
        """Wait for a message; the coordinator's silence ends the wait through `_abort`."""
        message = self._messages.get()
        if isinstance(message, Exception):
            raise message
        assert isinstance(message, kind), message
        return message

    def _await_verdict(self) -> None:
        """Wait for the coordinator's answer, an abort: it may only just be starting when a worker fails early."""
        with contextlib.suppress(queue.Empty):
            while not isinstance(self._messages.get(timeout=self.config.runtime.timeout_s), Exception):
                pass

    def _failure(self, error: Exception) -> messages.Failed:
        cause, text = _cause(error)
        return messages.Failed(
            cause=cause,
            message=text[:2000],
            traceback=traceback.format_exc()[-8000:],  # its end has the cause
            peer=error.peer if isinstance(error, PeerLost | Unreached) else None,
            phase=self.timer.phase,
            step=self.timer.step,
            micro_batch=self.timer.micro_batch,
        )

    def _on_signal(self, number: int) -> None:
        """Ask the coordinator for a stop in order. Called by the control thread."""
        self._channel.send(messages.StopRequested(signal=number))

    def _written(self, sequence: int, files: list[dict[str, Any]], seconds: float) -> None:
        """A part of a checkpoint is on disk. Runs in the writer's thread."""
        parts = [messages.File(**file) for file in files]
        self._channel.send(messages.Written(sequence=sequence, files=parts, seconds=seconds))

    def _write_failed(self, error: Exception, step: int) -> None:
        """A checkpoint could not be written. Runs in the writer's thread."""
        report = replace(self._failure(error), phase=Phase.CHECKPOINT, step=step, micro_batch=None)
        self._channel.send(replace(report, cause=Cause.DISK) if isinstance(error, OSError) else report)

    def _abort(self, reason: str, kind: type[Aborted] = Aborted) -> None:
        """End the training thread's waits, and the process if that does not suffice. Runs in the control thread."""
        ended = kind(reason)
        self._messages.put(ended)
        for part in (self._transport, self._loader, self._writer):
            if part is not None:
                part.abort(ended)
        code = 2 if kind is Refused else 1
        threading.Thread(target=_end_process, args=(reason, code), name="abort", daemon=True).start()


def _check(updaters: Mapping[int, Updater], block: int, state: dict[str, Any]) -> None:
    """Before a part of a checkpoint is written: a loss may be finite where its gradient was not."""
    name = updaters[block].nonfinite(state)
    if name is not None:
        raise NonFinite(f"{name} of block {block} is NaN or infinite, though no loss was: it is not saved")


def _cause(error: Exception) -> tuple[Cause, str]:
    text = f"{type(error).__name__}: {error}"
    allocation = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # of torch, on the CPU
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or allocation:
        peak = peak_memory() >> 20
        return Cause.OUT_OF_MEMORY, f"out of memory, the peak so far was {peak} MiB: {text}"
    match error:
        case Unreached():  # if it is known whom it did not reach, the coordinator knows better whether that one died
            return Cause.NETWORK if error.peer is None else Cause.PEER_LOST, str(error)
        case PeerLost():
            return Cause.PEER_LOST, text
        case NonFinite():
            return Cause.NONFINITE, str(error)
        case SetupError():
            return Cause.CONFIG, str(error)
        case CheckpointError():
            return Cause.CHECKPOINT, str(error)
        case OSError() if error.errno in DISK:
            return Cause.DISK, text
        case _:
            return Cause.RAISED, text


def _end_process(reason: str, code: int) -> None:
    time.sleep(2)  # so long the training thread has to notice the abort
    print(f"ended, because the training thread did not react to: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _device(config: Config) -> torch.device:
    """Device of this worker: the workers of a host take its GPUs in the order of their local rank."""
    if config.runtime.device == "cpu" or (config.runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    arithmetic.settle(config)
    return device
