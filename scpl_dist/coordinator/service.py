"""The coordinator's process.

    workers --ROUTER--.                        .-- messages to workers
    launcher --stdin--+-> events -> Coordinator -> commands -+-- run folder, checkpoints
    clock, signals ---'     (under one lock)   '-- terminal; a second thread serves the metrics

A thin shell: it turns bytes into events and commands into bytes and decides nothing. It starts fast because it
imports no torch, and until the run is over nothing here waits for a peer.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import zmq

from scpl_dist.control import keys
from scpl_dist.control.channel import HEAL_S
from scpl_dist.control.codec import ProtocolError, decode, encode
from scpl_dist.control.messages import VERSION, Abort, Close, Closed, Hello
from scpl_dist.control.sockets import router
from scpl_dist.coordinator import events, loggers
from scpl_dist.coordinator.event_log import Origin
from scpl_dist.coordinator.http_server import listening
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.launcher import Launcher
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.members import Member
from scpl_dist.coordinator.progress import Progress, failure_text, summary
from scpl_dist.coordinator.status import Status, snapshot
from scpl_dist.run import config as configuration
from scpl_dist.run import network, open_files
from scpl_dist.run.config import Config
from scpl_dist.run.failures import MEANING, Cause, Outcome, failure
from scpl_dist.run.faults import Trap
from scpl_dist.storage import checkpoints, lock
from scpl_dist.storage.durable import write_text
from scpl_dist.storage.resume import begin
from scpl_dist.storage.run_folder import RunFolder

TICK_S = 0.25
LATE_S = 0.5  # behind its time, a tick waits for one more
BACK_S = 2 * HEAL_S  # after so long without a connection, no worker comes back, be it under another name
CLEAR_S = 3.0  # so long room is made on a full disk before the end of the run is written
BURST = 100  # messages that are handled between two looks at the clock: a flood must not hide a timeout


class Service:
    """Sockets, files and terminal around one `Coordinator`; the arguments are those of `serve`."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        generation: str,
        restore: str,
        restarted: Sequence[str],
        launched: bool,
        may_restart: bool,
        replaceable: bool = True,
        led: bool = False,
    ) -> None:
        self._config = config
        self._folder = folder
        self._restarted = Counter(restarted)
        self._may_restart = may_restart
        self._outcome: Outcome | None = None
        self._closing: tuple[bytes, ...] = ()  # workers that were told of it, and will answer
        self._trap = Trap("coordinator", None, folder.path)
        self._launcher = Launcher(0) if launched else None
        self._publisher = ThreadPoolExecutor(1)  # a slow disk must not silence the coordinator
        self._found: queue.SimpleQueue[events.Event] = queue.SimpleQueue()  # signal handlers, publisher
        position = checkpoints.manifest_of(Path(restore))["position"] if restore else None
        place = str(folder.path.resolve())
        origin = Origin(
            generation,
            resume=position,
            restore=restore,
            folder=place,
            restarted=tuple(restarted),
            replaceable=replaceable,
            led=led,
        )
        self._coordinator = Coordinator(config, origin)
        self._lock = threading.Lock()
        self._http = listening(self._status, config.metrics)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control = config.control
        guards = keys.load_server(control.keys)
        self._router, self._endpoint, self._gate = router(self._context, control.host, control.port, guards)
        folder.metrics.rewind(position["step"] if position else 0, position["epoch"] if position else 0)
        checkpoints.clear(folder.path, Path(restore) if restore else None)
        self._logs = {worker.file: folder.log_size(worker.file) for worker in config.layout.workers}
        self._progress = Progress(self._coordinator)
        self._loggers = loggers.Loggers(config, folder.path, position["step"] if position else 0)
        run = {
            "generation": generation,
            "pid": os.getpid(),
            "control": self._endpoint,
            "metrics": self._http.url,
        }
        folder.write("run.json", run)
        if not restarted:
            self._progress.say(events.Say(f"run folder {folder.path}, metrics at {self._http.url}"))

    def _status(self) -> Status:
        with self._lock:
            return snapshot(self._coordinator, self._coordinator.clock(time.monotonic()), self._restarted)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._found.put(events.Signal("coordinator", number))

    def run(self) -> int:
        """Until the run is over; returns its exit code."""
        try:
            self._loop()
        except Exception as error:  # a mistake in here must end the run, and be readable afterwards
            self._crashed(error)
        assert self._outcome is not None
        self._loggers.end(self._outcome.code, self._outcome.result)
        self._progress.close()
        self._folder.metrics.close()
        code = self._conclude(self._outcome)
        self._see_off()
        self._warn(self._loggers.close())  # after all who would take its silence for its loss have gone
        self._folder.metrics.close()
        self._gate.close()
        self._router.close(1000)  # at most so many milliseconds for what is still to be sent
        self._context.term()
        return code

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for source in (self._router, *self._gate.sockets):
            poller.register(source, zmq.POLLIN)
        if self._launcher is not None:
            poller.register(self._launcher.descriptor, zmq.POLLIN)
        return poller

    def _loop(self) -> None:
        poller = self._poller()
        tick = time.monotonic()
        touched = tick
        late = False
        while self._outcome is None:
            ready = dict(poller.poll(max(0, math.ceil((tick - time.monotonic()) * 1000))))
            for event in self._events(ready):
                self._handle(event)
                if self._outcome is not None:  # what comes now is an answer to it
                    return
            if time.monotonic() >= tick:
                # Held up, and others with it on this machine: what they have to say comes before any limit, once.
                late = not late and time.monotonic() >= tick + LATE_S
                if not late:
                    self._ticked()
                tick = time.monotonic() + TICK_S
            if time.monotonic() >= touched:
                self._publisher.submit(lock.touch, self._folder.path)
                touched = time.monotonic() + lock.TOUCHED_EVERY_S

    def _see_off(self) -> None:
        """Wait until all who were told of a good end have heard it.

        On a slow line, or one that was down, the word may still be on its way, and this process's end would undo it: a
        worker that misses it has lost its coordinator, and fails. Within a host nothing is on its way for long.
        Whoever comes now is told, too: one that has come too late, or back under another name.
        """
        local = network.is_loopback(network.split_endpoint(self._endpoint)[0])
        now = time.monotonic()
        deadline = now + (HEAL_S if local else self._config.runtime.timeout_s)
        known = dict(self._coordinator.present)
        reached = dict.fromkeys(self._closing, now)  # who has not answered, and when the word went out last
        close = encode(Close())
        poller = self._poller()
        while now < deadline and any(now - last < BACK_S for last in reached.values()):
            for event in self._events(dict(poller.poll(int(TICK_S * 1000)))):
                match event:
                    case events.Received(peer, Closed()):
                        reached.pop(peer, None)
                    case events.Received(peer, Hello() as hello):
                        process = (hello.host, hello.pid)  # which has given its old connection up, or is new
                        for one in [*reached]:
                            if (known[one].hello.host, known[one].hello.pid) == process:
                                del reached[one]
                        known[peer] = Member(peer, hello, now, now)
                        reached[peer] = now
                    case events.LauncherLost() if self._launcher is not None:
                        poller.unregister(self._launcher.descriptor)
                    case events.Signal():
                        return
            if self._launcher is not None and reached:
                self._launcher.working()
            now = time.monotonic()
            for peer in reached:  # a connection that broke takes the word with it, and may come back
                if self._sent(peer, close):
                    reached[peer] = now
        for member in [known[peer] for peer in reached]:
            text = f"{member.name} on {member.hello.host} may not have heard that the run is over"
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _ticked(self) -> None:
        self._handle(events.Tick())
        if self._launcher is not None and self._coordinator.present:
            self._launcher.working()
        for event in self._written(self._folder.metrics.flush):
            self._handle(event)
        self._progress.update(self._coordinator.clock(time.monotonic()))
        self._warn(self._loggers.problems())

    def _events(self, ready: Mapping[Any, int]) -> Iterator[events.Event]:
        """What has happened at the `ready` sources; what a worker has said comes before the news of its end."""
        for _ in range(BURST):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                event: events.Event = events.Received(peer, decode(frames[0] if len(frames) == 1 else b""))
            except ProtocolError:
                event = events.Garbage()
            yield event
        if self._launcher is not None and self._launcher.descriptor in ready:
            yield from self._launcher.events()
        if any(guard in ready for guard in self._gate.sockets):
            yield from self._gate.events()
        while not self._found.empty():
            yield self._found.get()

    def _crashed(self, error: Exception) -> None:
        text = f"the coordinator failed: {type(error).__name__}: {error}"
        crash = replace(failure(Cause.COORDINATOR, text), traceback=traceback.format_exc())
        self._outcome = Outcome(1, text, crash)
        frame = encode(Abort(reason=text[:1000]))
        for member in self._coordinator.ordered():
            self._sent(member.peer, frame)

    def _handle(self, event: events.Event) -> None:
        """Hand an event to the coordinator, and the events that its commands cause."""
        if self._trap.armed:
            steps = [member.step for member in self._coordinator.members.values()]
            self._trap.spring(self._coordinator.state, max(steps, default=0))
        pending = deque([event])
        while pending:
            with self._lock:
                commands = self._coordinator.handle(pending.popleft(), time.monotonic())
            for command in commands:
                pending.extend(self._execute(command))

    def _execute(self, command: events.Command) -> list[events.Event]:
        match command:
            case events.Send(peers, message):
                frame = encode(message)
                return [events.Unreachable(peer, message) for peer in peers if not self._sent(peer, frame)]
            case events.Record(row):
                flow = self._coordinator.flow
                self._loggers.row(row, flow.sequence if flow is not None else None)
                row = row | {"time": time.time()}
                return self._written(lambda: self._folder.metrics.append(row))
            case events.Say():
                self._progress.say(command)
            case events.Replace(rank, pid):
                if self._launcher is not None:
                    self._launcher.replace(rank, pid)
            case events.Rewind(step, epoch):
                return self._rewind(step, epoch)
            case events.Commit():
                # A run that goes on from it needs all rows up to it.
                problems = self._written(self._folder.metrics.flush)
                if not problems:
                    self._publisher.submit(self._publish, command)
                return problems
            case events.Discard(step, unique):
                self._publisher.submit(
                    checkpoints.remove, [checkpoints.folder_for(self._folder.path, step, unique)]
                )
            case events.Finish(outcome, closing):
                self._outcome, self._closing = outcome, closing
        return []

    def _rewind(self, step: int, epoch: int) -> list[events.Event]:
        problems = self._written(lambda: self._folder.metrics.rewind(step, epoch))
        if not problems:
            self._clear()
        return problems

    def _clear(self) -> Future[None]:
        """Remove the checkpoints that are unfinished now, after what is being published: that is none of them then."""
        return self._publisher.submit(checkpoints.remove, checkpoints.unfinished(self._folder.path))

    def _written(self, write: Callable[[], object]) -> list[events.Event]:
        """Write to ``metrics.jsonl``; the event of it, if that failed."""
        try:
            write()
        except OSError as error:
            return [events.NotWritten("metrics.jsonl", str(error), _cause(error))]
        return []

    def _warn(self, texts: Iterable[str]) -> None:
        for text in texts:
            for command in events.warning(text):
                self._execute(command)

    def _sent(self, peer: bytes, frame: bytes) -> bool:
        """Whether the message is on its way; a peer that is gone or does not read never blocks."""
        try:
            self._router.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def _publish(self, command: events.Commit) -> None:
        """Runs in the publisher's thread."""
        source = checkpoints.folder_for(self._folder.path, command.step, command.unique)
        begin = time.monotonic()
        try:
            self._trap.spring("commit", command.step)
            checkpoints.commit(source, self._manifest(command), self._config.checkpoint.keep)
            self._trap.spring("committed", command.step)
        except Exception as error:  # whatever it is, the coordinator must hear of it
            text = f"{type(error).__name__}: {error}"
            self._found.put(events.NotWritten("checkpoint", text, _cause(error)))
            return
        size = sum(int(file["bytes"]) for file in command.files)
        self._found.put(events.Committed(command.step, size, command.seconds + time.monotonic() - begin))

    def _manifest(self, command: events.Commit) -> dict[str, Any]:
        assert self._coordinator.data is not None
        return {
            "step": command.step,
            "epoch": command.epoch,
            "position": command.position,
            "method": self._config.run.method,
            "stages": self._coordinator.config.pipeline.stages,
            "config": self._config.digest(),
            "versions": {"scpl_dist": VERSION, "torch": self._coordinator.torch},
            "files": command.files,
            "best": command.best,
            "due": command.due,
            "recipe": self._config.recipe(),
            "sizes": self._coordinator.data.sizes,
            "created": time.time(),
        }

    def _conclude(self, outcome: Outcome) -> int:
        """Say how the run ended, in its folder and on the screen; a full disk must not hide it."""
        found = outcome.failure
        if found is None:
            _try("exit.json", lambda: self._folder.finish(outcome))
            print(summary(outcome, self._folder.path), flush=True)
            return outcome.code
        name = found.log
        if name is None and found.rank is not None and found.rank < self._config.layout.world:
            name = self._config.layout.workers[found.rank].file
        if found.cause is Cause.DIED and name is not None:
            # Whoever died before it could report may have left its reason in the log.
            found = replace(found, traceback=self._folder.last_words(name, self._logs.get(name, 0)))
        if found.cause is Cause.DISK:  # what fills it is of no use any more
            wait([self._clear()], CLEAR_S)
        _try("exit.json", lambda: self._folder.finish(replace(outcome, failure=found)))
        events_log = "".join(f"{line}\n" for line in self._coordinator.log.lines())
        _try("log/events.jsonl", lambda: write_text(self._folder.log / "events.jsonl", events_log))
        text = failure_text(found, self._folder.log, name)
        if self._may_restart:
            text = text.replace("The run failed.", "This start of the run failed.", 1)
        print(text, file=sys.stderr, flush=True)
        return outcome.code


def _cause(error: Exception) -> Cause:
    """Why something could not be written."""
    full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return Cause.OPEN_FILES if full else Cause.DISK


def _try(what: str, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        print(f"warning: {what} could not be written: {error}", file=sys.stderr)


def alone(config: Config, run_dir: Path | None, resume: str) -> int:
    """Run the service on its own, without a launcher: the workers come when they come.

    With ``control.port = 0`` the port is the one that workers expect. ValueError if the folder cannot be used.
    """
    open_files.raise_limit()
    fixed = config.model_copy(update={"control": config.control.fixed()})
    loggers.check(fixed)
    restore, manifest, seen = begin(run_dir, resume, fixed)
    if "sizes" in manifest:  # or else the data set shows whether the run can go on there
        ItemSequence(fixed, manifest["sizes"], manifest["position"])
    folder = RunFolder.create(run_dir, fixed, resume=resume != "never")
    with folder.taken(fixed, seen=seen):
        folder.clear()
        return serve(str(folder.path), uuid.uuid4().hex, restore)


def serve(
    run_dir: str,
    generation: str,
    restore: str = "",
    restarted: Sequence[str] = (),
    launched: bool = False,
    may_restart: bool = False,
    replaceable: bool = True,
    led: bool = False,
) -> int:
    """Be the coordinator of the run in a folder, whose ``config.toml`` is the configuration; returns the exit code.

    `generation` is a unique name of this start, `restore` the verified checkpoint that it goes on from, if any, and
    `restarted` what ended each earlier one. If it is `launched`, a launcher is at the other end of standard input,
    which `may_restart` the run after a failure, and is itself the worker of rank 0 if all is `led` by that. Workers are
    `replaceable` where somebody starts others.
    """
    try:
        config = configuration.load(Path(run_dir, "config.toml"))
        folder = RunFolder.open_for_writing(Path(run_dir))
        service = Service(
            config, folder, generation, restore, restarted, launched, may_restart, replaceable, led
        )
    except (ValueError, OSError, checkpoints.CheckpointError) as error:
        return not_begun(Path(run_dir), error)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, service.on_signal)
    return service.run()


def not_begun(run_dir: Path, error: Exception) -> int:
    """Say why a start cannot begin, and write it into its folder; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    cause = Cause.CONFIG
    if isinstance(error, checkpoints.CheckpointError):
        cause = Cause.CHECKPOINT
    elif isinstance(error, OSError):
        cause = _cause(error)
    code = MEANING[cause].code
    with contextlib.suppress(ValueError, OSError):  # the folder may be the problem, as the message says
        RunFolder(run_dir).fail(code, str(error), cause)
    return code
