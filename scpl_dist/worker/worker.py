"""The process of one worker: joins the run, builds its blocks, runs the executor, leaves.

    control thread (scpl_dist.control.channel)          training thread (this module)
    hello  ----> coordinator                    loads the data set (stage 0 only)
    start  <---- all workers are there          builds blocks and heads                               .-- leaves the
    built  ---->                                                                                      |   others, keeps
    join   <---- all have built theirs          joins the other workers' transport                    |   its blocks
    ready  ---->                                                                                      v
    go     <---- all workers are ready          Executor.run(): items until the stop marker  -- regroup --> free
    left   ---->                                                                                      |
    close  <---- all workers have left          exit 0                                    start again, in a new group

Whatever goes wrong is reported to the coordinator, which ends the run; if it has fallen silent, the worker ends
itself. Where the coordinator is a service of its own, which somebody starts again, a worker that has lost it leaves its
group, keeps its blocks, and says hello anew. The last thing a worker does is `os._exit`: no library's clean-up can keep
a process of a dead run alive.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from scpl_dist import data
from scpl_dist.control import keys, messages
from scpl_dist.control.channel import STOPS, Channel
from scpl_dist.control.items import Item
from scpl_dist.data import DataSource
from scpl_dist.data.loader import Loader
from scpl_dist.data.sampling import weights_of
from scpl_dist.methods import arithmetic
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run import imports, network
from scpl_dist.run.config import Config
from scpl_dist.run.errors import Aborted, NonFinite, PeerLost, Regrouped, SetupError
from scpl_dist.run.failures import Cause
from scpl_dist.run.faults import Trap
from scpl_dist.run.layout import Layout, WorkerId
from scpl_dist.run.phases import Phase
from scpl_dist.storage.checkpoints import CheckpointError, manifest_of
from scpl_dist.storage.parts import part_name, read_part
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport import Transport, rendezvous, select, tensors
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.reachability import ReachabilityCheck, Unreached
from scpl_dist.worker.allocator import keep_freed_memory, return_freed_memory
from scpl_dist.worker.executor import Executor, feed, peak_memory
from scpl_dist.worker.offload import Offload, make
from scpl_dist.worker.preprocessing import keep
from scpl_dist.worker.replicas import Replicas
from scpl_dist.worker.stacks import Stacks
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.trace import Trace
from scpl_dist.worker.updater import Updater

M = TypeVar("M", bound=messages.Message)
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # errors that come from a disk


class Refused(Aborted):
    """The coordinator does not take this worker."""


class Worker:
    """One worker's process, of a rank in the launch; raises ValueError if an address or a key is not usable.

    Without a `rank` it takes the place that the coordinator gives it. `log` is the name of its log in the run folder,
    which is shared by all stages; None is the path that the coordinator, at ``tcp://host:port``, has. Of a `service`
    another one is waited for, for ``runtime.replace_s`` seconds, if it is lost.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path | None,
        control: str,
        rank: int | None,
        log: str = "",
        service: bool = False,
    ) -> None:
        self.config = config  # with the stages that the present group has
        self.run_dir = run_dir
        self.name = (
            f"stage {config.layout.workers[rank].label}" if rank is not None else "a worker without a stage"
        )
        self._problem: SetupError | None = None
        try:
            self.device = _device(config, rank)
        except ValueError as error:  # the coordinator shall hear it, or all others would wait for this stage
            self._problem, self.device = SetupError(str(error)), torch.device("cpu")
        if config.runtime.offload != "off":
            return_freed_memory()
        elif config.runtime.keep_memory:
            keep_freed_memory()
        self.reason = ""  # why `run` did not return 0
        self._given = config
        self._rank = rank
        self._log = log
        first = None if rank is None else config.layout.workers[rank]
        self._trap = Trap("worker", first, run_dir) if run_dir and first else None
        self.timer = PhaseTimer(self._trap)
        self._control = control
        self._returns = service and config.runtime.max_restarts > 0
        self._welcome = False  # the coordinator of the present channel has spoken to this worker
        self._lost = False  # it is gone, and the group with it
        self._keys = keys.load_client(config.control.keys)
        self._messages: queue.SimpleQueue[messages.Message | Exception] = queue.SimpleQueue()
        self._channel: Channel
        self._group = 0
        self._regrouping = threading.Event()  # the present group is to be left
        self._leaving = threading.Lock()  # that and what goes with it are one thing for the training thread
        self._joining = False  # in calls that nothing but the end of the process can end
        self._over = threading.Event()  # `run` is at its end, and whoever has called it goes on
        self._stacks: Stacks | None = None
        self._source: DataSource | None = None
        self._plan: Plan | None = None
        self._updaters: dict[int, Updater] = {}  # by block
        self._offload: Offload | None = None  # that has them, with ``runtime.offload``
        self._bound = False  # these to the replicas of a group
        self._lag: float | None = None  # of this host's clock, see `Heartbeat`
        self._transport: Transport | None = None
        self._loader: Loader[Item] | None = None
        self._writer: CheckpointWriter | None = None
        self._executor: Executor | None = None
        world = config.layout.world
        alone = network.workers_here(world) == world
        coordinator = network.resolve(network.split_endpoint(control)[0], "control.host")
        try:
            self._interface, self._address = network.choose_interface(
                config.runtime.interface, coordinator, alone
            )
        except ValueError as error:  # likewise
            self._problem = SetupError(str(error))
            self._interface, self._address = network.loopback(), "127.0.0.1"
        self._reachability = self._door()

    def _door(self) -> ReachabilityCheck:
        """Where the others of the next group ring, and the socket of the store that this worker may have to serve."""
        self._store_listener = socket.create_server((self._address, 0), backlog=128)
        return ReachabilityCheck(self._address, self._interface, self.name, self.device)

    @property
    def _endpoint(self) -> dict[str, Any]:
        return self._reachability.endpoint | {"store": self._store_listener.getsockname()[1]}

    def run(self) -> int:
        """Everything from hello to close; returns the exit code: 2 if the coordinator refused this worker."""
        if self._trap is not None:
            self._trap.spring("loading", 0)
        self._say_hello(self.config.runtime.first_step_timeout_s)
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
            try:
                self._await_verdict()
            except Aborted:  # which says no more than this worker knows
                self._channel.close(0)
            return 1
        finally:
            if self.timer.trace is not None:
                self.timer.trace.close()
            self._channel.close()
            if self._transport is not None:
                self._transport.close()
            self._over.set()

    def _say_hello(self, patience_s: float) -> None:
        """To a coordinator that comes within so many seconds, or ``runtime.timeout_s`` if that is more."""
        # Not before somebody can be asked for a stop: until then a signal ends this process, which tells as much.
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        self._welcome = False
        self._channel = Channel(
            self._control,
            self._hello(),
            heartbeat=self._heartbeat,
            on_message=self._on_message,
            on_lost=self._on_lost,
            timeout_s=self.config.runtime.timeout_s,
            keys=self._keys,
            arrival_s=patience_s,
        )
        self._channel.connected.wait()
        self._channel.watch_signals(self._on_signal)

    def _train(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._rank is not None and self.config.layout.workers[self._rank].stage == 0:
            self._describe()
        self.timer.enter(Phase.IDLE)
        while True:
            with contextlib.suppress(
                Regrouped
            ):  # another one died before it had left, or the coordinator at any time
                message = self._message()
                if not isinstance(message, messages.Start):
                    return
                if self._take_part(message):
                    self._expect(messages.Close)
                    return
            self._leave_group()

    def _take_part(self, start: messages.Start) -> bool:
        """Be part of one group of workers; False if another is formed before all is done."""
        self._group = start.group
        self.timer.enter(Phase.STARTING)
        try:
            executor = self._join(start)
            self._channel.send(messages.Ready(group=self._group))
            self._expect(messages.Go)
            self._reachability.close()
            executor.run()
            self._channel.send(messages.Left(group=self._group))
        except Aborted:
            raise
        except (PeerLost, Unreached) as error:
            if not self._regrouping.is_set():
                if isinstance(error, Unreached) and error.peer is None:
                    raise
                self._channel.send(self._failure(error))
                self._await_verdict()
        except Regrouped:
            pass
        except Exception:
            if not self._regrouping.is_set():
                raise
            # It comes of the others' leaving; if it does not, it comes again.
            print(f"left group {self._group} in the middle of something:", file=sys.stderr)
            traceback.print_exc()
        else:
            return True
        return False

    def _leave_group(self) -> None:
        """Leave the others, and be free for the next group; the blocks stay."""
        self.timer.enter(Phase.IDLE)
        self._executor = None
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
        rendezvous.leave()
        if self._loader is not None:
            self._loader.abort(Regrouped())
            self._loader = None
        if self._writer is not None:
            self._writer.drain()
        self._reachability.close()
        self._store_listener.close()
        # Stores and connections are parts of cycles: without a look for them they would pile up, with their threads.
        gc.collect()
        self._reachability = self._door()
        with self._leaving:
            # All of this group: none of the next one comes before this worker is free.
            while not self._messages.empty():
                message = self._messages.get()
                if isinstance(message, Exception) and not isinstance(message, Regrouped):
                    raise message
            self._regrouping.clear()
            lost, self._lost = self._lost, False
        if not lost:
            self._channel.send(messages.Free(group=self._group, endpoint=self._endpoint))
            return
        self._channel.close(0)
        self._say_hello(self.config.runtime.replace_s)
        if self._source is not None:
            self._channel.send(self._described(self._source))

    def _describe(self) -> None:
        """Load the data set, and tell the coordinator what it is: the other stages need its shapes only.

        Its loader may fork, which is best done now: there are few threads yet, and no connections to other workers.
        """
        self.timer.enter(Phase.DATA)
        source = self._load()
        self._loader = self._loader_of(source)
        self._channel.send(self._described(source))

    def _described(self, source: DataSource) -> messages.Described:
        example = tensors.describe(source.example(), "the data set")
        counts = data.counts(self.config, source)
        sizes = dict(source.sizes)
        data_set = messages.Dataset(classes=source.classes, sizes=sizes, input=example, counts=counts)
        return messages.Described(data=data_set)

    def _load(self) -> DataSource:
        if self._source is None:
            self._source = data.resolve(
                self.config, None if self.run_dir is None else RunFolder(self.run_dir).labels()
            )
        return self._source

    def _loader_of(self, source: DataSource) -> Loader[Item]:
        weights = weights_of(self.config, source)
        pinned = self.device.type == "cuda"
        return Loader(source, self.config.run.seed, self.config.data.workers, weights=weights, pinned=pinned)

    def _join(self, start: messages.Start) -> Executor:
        """The stage, its weights restored, and connected to the other workers."""
        config = self._given
        if start.group or tuple(start.replicas) != config.layout.replicas:
            config = config.shaped(start.replicas, start.partition)
        layout = config.layout
        me = layout.workers[start.rank]
        self.config = config = config.at(me.stage)
        self.name = f"stage {me.label}"
        run_dir = self.run_dir = self._shared_folder(start)
        self._trap = Trap("worker", me, run_dir)
        self.timer.regrouped(self._trap)
        timeout_s = config.runtime.timeout_s
        if self._stacks is None:
            self._stacks = Stacks(
                run_dir / "log" / f"{self._log or f'worker-{os.getpid()}'}.stacks", timeout_s
            )
            self.timer.on_item = self._stacks.rearm
        self._reachability.visit(me.rank, start.endpoints, timeout_s / 3)
        source = self._load() if me.stage == 0 else None
        if source is not None and me.first and start.group == 0:
            keep(run_dir, start.data, source)
        if source is not None:
            self._loader = self._loader or self._loader_of(source)
            self._loader.share = (me.replicas, me.replica)  # it may be older than this group
        elif self._loader is not None:
            self._loader.abort(Regrouped())
            self._loader = None
        plan, spec = self._build(start, source)
        self._channel.send(messages.Built(group=self._group, blocks=list(spec.blocks)))
        self._expect(messages.Join)
        self._joining = True
        try:
            self._spring("joining", 0)
            transport, replicas = self._connect(layout, me, start)
        finally:
            self._joining = False
        self._bound = replicas is not None
        if replicas is not None:
            for updater in self._updaters.values():
                replicas.share_statistics(updater.trainable)
        if me.first and self._writer is None:
            self._writer = CheckpointWriter(self._written, self._write_failed, self._check, self._spring)
        self._executor = Executor(
            spec=spec,
            method=plan.method,
            updaters=self._updaters,
            neighbours=Neighbours(transport, layout, me),
            device=self.device,
            timer=self.timer,
            report=self._report,
            run_dir=run_dir,
            loader=self._loader,
            writer=self._writer if me.first else None,
            replicas=replicas,
            offload=self._offload,
        )
        self._trace(start, me, run_dir)
        if self._regrouping.is_set():
            raise Regrouped
        self.timer.enter(Phase.IDLE)
        return self._executor

    def _build(self, start: messages.Start, source: DataSource | None) -> tuple[Plan, StageSpec]:
        """The blocks of the stage as they were at the cut that the group begins at, or drawn."""
        config = self.config
        example = tensors.imagine(start.data.input, "meta")
        if self._plan is None:
            self._plan = Plan.plan(config, start.data.classes, example, start.data.counts)
            if start.rank == 0 and self.run_dir is not None:
                RunFolder(self.run_dir).write("model.json", self._plan.outline())
        else:
            self._plan = self._plan.shaped(config)
        plan = self._plan
        spec = plan.specs[config.layout.workers[start.rank].stage]
        # Those that stay keep what they are compiled to; the cut says all that is in them. What was bound to replicas
        # asks these for statistics, though the group has gone.
        stay = start.restore and config.layout.world == len(plan.specs) and not self._bound
        kept = {block: own for block, own in self._updaters.items() if stay and not own.frozen}
        self._updaters = {block: kept[block] for block in spec.blocks if block in kept}
        if self._offload is None and self.run_dir is not None:
            self._offload = make(config, self.device, self.run_dir)
        if self._offload is not None:
            self._offload.keep(self._updaters.keys())
        # One after the other where they do not fit together; else all, which a model's function makes at one go.
        for blocks in [spec.blocks] if self._offload is None else [[block] for block in spec.blocks]:
            new = [block for block in blocks if block not in self._updaters]
            self._updaters |= self._made(plan, new, None if start.restore else source, not start.restore)
            if start.restore:
                self._restore(Path(start.restore), config.layout.workers[start.rank].first, blocks)
            if self._offload is not None:
                self._offload.put(blocks[0], wait=True)
        self._updaters = {block: self._updaters[block] for block in spec.blocks}
        return plan, spec

    def _made(
        self, plan: Plan, blocks: Sequence[int], source: DataSource | None, fresh: bool
    ) -> dict[int, Updater]:
        """New blocks; if they are `fresh`, and nothing of a checkpoint comes, with their first weights."""
        trainables = plan.trainables(blocks)
        if fresh and trainables:
            if source is not None and 0 in trainables:
                source.prepare(trainables[0].block)
            try:
                plan.load_weights(trainables)
            except ValueError as error:  # on this host the file is another one, or absent
                raise SetupError(str(error)) from None
        made = {block: Updater(own.to(self.device), plan.config) for block, own in trainables.items()}
        if self._offload is not None:
            for block, updater in made.items():
                self._offload.add(block, updater)
        return made

    def _restore(self, checkpoint: Path, first: bool, blocks: Iterable[int]) -> None:
        self._await(checkpoint / "manifest.json")
        manifest = manifest_of(checkpoint)
        step, parts = int(manifest["step"]), {entry["name"] for entry in manifest["files"]}
        for block in blocks:
            updater = self._updaters[block]
            if self._offload is not None:
                self._offload.have(block)
                self._offload.change(block)
            state = None if self._writer is None else self._writer.kept(step, block)
            if state is None:
                if part_name(block) in parts:
                    self._await(checkpoint / part_name(block))
                # To the CPU: an optimizer's numbers of steps stay where they are read to, and it looks at them.
                state = read_part(checkpoint, block, verified=True)
                name = updater.nonfinite(state)
                if name is not None:
                    raise CheckpointError(
                        f"{checkpoint}: {name} of block {block} is NaN or infinite, which an earlier version did "
                        "save: move this checkpoint away, and --resume auto takes the one before"
                    )
            if not first:
                state.pop("gradients", None)  # the sum over the replicas, which the first one brings in
            try:
                updater.load_state_dict(state)
            except CheckpointError as error:  # a start from the same one would end here again
                raise SetupError(str(error)) from error

    def _await(self, path: Path) -> None:
        """Wait for a file of the checkpoint, which a shared file system may show late on another host."""
        limit = self.config.runtime.timeout_s / 2  # the coordinator waits longer for this worker
        deadline = time.monotonic() + limit
        if not path.exists():
            print(f"waiting for {path}, which this host does not show", file=sys.stderr, flush=True)
        while not path.exists():
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"{path}: {socket.gethostname()} has not shown this file within {limit:g} s, though it was there "
                    "when this worker was told of it: mount the same shared file system on all hosts, and resume; if "
                    "it only needs longer, raise runtime.timeout_s"
                )
            if self._regrouping.wait(0.1):
                raise Regrouped

    def _connect(
        self, layout: Layout, me: WorkerId, start: messages.Start
    ) -> tuple[Transport, Replicas | None]:
        """Connections to the other workers, who are all alive and do the same."""
        config, generation = self.config, f"{start.generation}-{start.group}"
        limit = config.runtime.timeout_s
        try:
            store = rendezvous.join(self._store_listener, me.rank, start.endpoints, limit)
            transport = select.connectable(
                config, me.rank, generation, start.group, self.device, start.endpoints
            )
            self._transport = transport
            if layout.world > 1:
                transport.connect(store)
            limit = config.runtime.first_step_timeout_s
            return transport, Replicas.join(layout, me, start.endpoints, self.timer, store, limit)
        except RuntimeError as error:  # all were alive, so one of them died meanwhile: torch does not say who
            if tensors.out_of_memory(error):
                raise
            lines = str(error).strip().splitlines()
            raise PeerLost(None, lines[0] if lines else type(error).__name__) from error

    def _trace(self, start: messages.Start, place: WorkerId, run_dir: Path) -> None:
        """Record what happens from here on, if that is wanted; without it, training is as good."""
        if self.timer.trace is not None:  # of the group before
            self.timer.trace.close()
            self.timer.trace = None
        every = self.config.trace.every
        if every == 0 or self._transport is None:
            return
        whose: dict[str, Any] = {"rank": place.rank, "stage": place.stage, "replica": place.replica}
        whose |= {"host": socket.gethostname(), "generation": f"{start.generation}-{start.group}"}
        try:
            trace = Trace(run_dir / "log", place.file, every, whose)
        except OSError as error:
            print(f"warning: no trace, its file cannot be made: {error}", file=sys.stderr, flush=True)
            return
        self.timer.trace = trace
        self._transport.on_passed = trace.passed

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
            config=self._given.digest(),
            code=imports.digest(self.config.model_dump(mode="json")),
            rank=self._rank,
            log=self._log,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name(self.device) if gpu else f"cpu ({platform.machine()})",
            endpoint=self._endpoint,
        )

    def _heartbeat(self) -> messages.Heartbeat:
        """Called by the control thread."""
        timer = self.timer
        executor = self._executor
        return messages.Heartbeat(
            group=self._group,
            phase=timer.phase,
            step=timer.step,
            epoch=timer.epoch,
            micro_batch=timer.micro_batch,
            stats=timer.stats() if executor is None else executor.stats(),
            clock=time.monotonic(),
            lag=self._lag,
        )

    def _on_message(self, message: messages.Message) -> None:
        """Called by the control thread."""
        self._welcome = True
        match message:
            case messages.Work(items=items) if self._loader is not None:
                feed(self._loader, items)
            case messages.Abort(reason=reason, stacks=stacks):
                if stacks and self._stacks is not None:
                    self._stacks.write(reason)
                self._abort(reason)
            case messages.Refuse(reason=reason):
                self._abort(reason, Refused)
            case messages.Start() | messages.Join() | messages.Go():
                self._messages.put(message)
            case messages.Close():
                self._channel.send(messages.Closed())
                self._messages.put(message)
            case messages.Regroup(reason=reason):
                self._interrupt(Regrouped(reason))
            case messages.Alive(clock=float(clock)):
                self._lag = time.monotonic() - clock
            case _:
                pass

    def _message(self) -> messages.Message:
        """Wait for a message; the coordinator's silence ends the wait through `_abort`."""
        message = self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def _expect(self, kind: type[M]) -> M:
        message = self._message()
        assert isinstance(message, kind), message
        return message

    def _await_verdict(self) -> None:
        """Wait for the coordinator's answer, an abort: it may only just be starting when a worker fails early."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._messages.get(timeout=self.config.runtime.timeout_s)
                if isinstance(message, Exception) and not isinstance(message, Regrouped):
                    raise message
                if isinstance(message, Regrouped):
                    return

    def _failure(self, error: Exception) -> messages.Failed:
        cause, text = _cause(error)
        at: tuple[int, int | None] = (self.timer.step, self.timer.micro_batch)
        if isinstance(error, NonFinite) and error.step is not None:
            at = (error.step, error.micro_batch)
        return messages.Failed(
            group=self._group,
            cause=cause,
            message=text[:2000],
            traceback=traceback.format_exc()[-8000:],  # its end has the cause
            peer=error.peer if isinstance(error, PeerLost | Unreached) else None,
            phase=self.timer.phase,
            step=at[0],
            micro_batch=at[1],
        )

    def _on_signal(self, number: int) -> None:
        """Ask the coordinator for a stop in order. Called by the control thread."""
        self._channel.send(messages.StopRequested(signal=number))

    def _written(self, sequence: int, files: list[dict[str, Any]], seconds: float) -> None:
        """A part of a checkpoint is on disk. Runs in the writer's thread."""
        parts = [messages.File(**file) for file in files]
        self._channel.send(
            messages.Written(group=self._group, sequence=sequence, files=parts, seconds=seconds)
        )

    def _write_failed(self, error: Exception, step: int) -> None:
        """A checkpoint could not be written. Runs in the writer's thread."""
        report = replace(self._failure(error), phase=Phase.CHECKPOINT, step=step, micro_batch=None)
        self._channel.send(replace(report, cause=Cause.DISK) if isinstance(error, OSError) else report)

    def _report(self, done: messages.Done) -> None:
        """An item is done. Called by the training thread."""
        self._channel.send(replace(done, group=self._group))

    def _check(self, block: int, state: dict[str, Any]) -> None:
        """Before a part of a checkpoint is written: a loss may be finite where its gradient was not."""
        name = self._updaters[block].nonfinite(state)
        if name is not None:
            raise NonFinite(
                f"{name} of block {block} is NaN or infinite, though no loss was: it is not saved"
            )

    def _spring(self, phase: str, step: int) -> None:
        if self._trap is not None:
            self._trap.spring(phase, step)

    def _on_lost(self, reason: str) -> None:
        """The coordinator is gone. Called by the control thread, which ends."""
        if not (self._returns and self._welcome):
            self._abort(reason)
            return
        waited = max(self.config.runtime.replace_s, self.config.runtime.timeout_s)
        print(f"{reason}: waiting for another one for {waited:g} s", file=sys.stderr, flush=True)
        self._interrupt(Regrouped(reason), lost=True)

    def _interrupt(self, error: Regrouped, lost: bool = False) -> None:
        """Have the training thread leave its group at its next step. Runs in the control thread."""
        with self._leaving:
            self._lost = self._lost or lost
            self._messages.put(error)
            self._regrouping.set()
            for part in (self._executor, self._transport, self._loader):
                if part is not None:
                    part.abort(error)
        rendezvous.hang_up()  # the training thread may wait for a GPU, which waits for another one
        arguments = (str(error), self._group)
        threading.Thread(target=self._end_if_stuck, args=arguments, name="regroup", daemon=True).start()

    def _end_if_stuck(self, reason: str, group: int) -> None:
        """Nothing but its end takes a process out of a call in which torch waits for a worker that is gone."""
        for seconds in (2.0, 8.0):
            if self._over.wait(seconds) or self._group != group or not self._regrouping.is_set():
                return
            if self._joining or (seconds > 2.0 and self.timer.phase is Phase.SYNC):
                _end_process(reason, 1)

    def _abort(self, reason: str, kind: type[Aborted] = Aborted) -> None:
        """End the training thread's waits, and the process if that does not suffice. Runs in the control thread."""
        ended = kind(reason)
        self._messages.put(ended)
        for part in (self._executor, self._transport, self._loader, self._writer):
            if part is not None:
                part.abort(ended)
        code = 2 if kind is Refused else 1
        threading.Thread(target=self._end_unless_over, args=(reason, code), name="abort", daemon=True).start()

    def _end_unless_over(self, reason: str, code: int) -> None:
        if not self._over.wait(2.0):  # so long the training thread has to notice the abort
            _end_process(reason, code)


def _cause(error: Exception) -> tuple[Cause, str]:
    text = f"{type(error).__name__}: {error}"
    if tensors.out_of_memory(error):
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
    print(f"ended, because the training thread did not react to: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _device(config: Config, rank: int | None) -> torch.device:
    """Device of this worker: the workers of a host take its GPUs in the order of their local rank."""
    if rank is not None:
        config = config.at(config.layout.workers[rank].stage)
    elif isinstance(config.runtime.device, list):
        raise ValueError(
            f"runtime.device = {config.runtime.device}: this worker learns its stage only when all have met; start it "
            "with its rank, or use one device for all"
        )
    device = arithmetic.device(config, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        arithmetic.settle(config)
    return device
