"""The coordinator's process.

    workers --ROUTER--.                        .-- messages to workers
    launcher --stdin--+-> events -> Coordinator -> commands -+-- run folder, checkpoints
    clock, signals ---'     (under one lock)   '-- terminal; a second thread serves the metrics

A thin shell: it turns bytes into events and commands into bytes and decides nothing. It starts fast because it
imports no torch, and nothing here waits for a peer.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import zmq

from scpl_dist.control import keys
from scpl_dist.control.codec import ProtocolError, decode, encode
from scpl_dist.control.messages import VERSION, Abort
from scpl_dist.control.sockets import router
from scpl_dist.coordinator.events import (
    Command,
    Commit,
    Committed,
    Discard,
    Event,
    Finish,
    Garbage,
    NotWritten,
    Received,
    Record,
    Say,
    Send,
    Signal,
    Tick,
    Unreachable,
)
from scpl_dist.coordinator.http_server import HttpServer
from scpl_dist.coordinator.launcher import Launcher
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.progress import Progress, failure_text, summary
from scpl_dist.coordinator.publisher import Publisher
from scpl_dist.coordinator.status import Status, snapshot
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.run.failures import MEANING, Cause, Outcome, failure
from scpl_dist.run.faults import Trap
from scpl_dist.storage import checkpoints
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.durable import write_text
from scpl_dist.storage.resume import choose
from scpl_dist.storage.run_folder import RunFolder

TICK_S = 0.25
FLUSH_MS = 1000
BURST = 100
"""Messages that are handled between two looks at the clock: a flood must not hide a timeout."""


class Service:
    """Sockets, files and terminal around one `Coordinator`.

    Args:
        config: the run.
        folder: the run's folder.
        generation: unique name of this start.
        resume: "never", "auto" or a folder, see `scpl_dist.storage.resume.choose`.
        restarts: earlier starts of this run by what ended them.
        launched: whether a launcher is at the other end of standard input.
        may_restart: whether the launcher may start the run again after a failure.

    Raises:
        ValueError: a port is taken, or there is no usable checkpoint.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        generation: str,
        resume: str = "never",
        restarts: Counter[str] | None = None,
        launched: bool = False,
        may_restart: bool = False,
    ) -> None:
        self.config = config
        self.folder = folder
        self.outcome: Outcome | None = None
        self._may_restart = may_restart
        self._trap = Trap.from_environment("coordinator", None, folder.path)
        self._publisher = Publisher(self._publish)
        chosen = choose(folder.path, resume, lambda text: print(f"warning: {text}", file=sys.stderr), config)
        position = chosen[1]["position"] if chosen else None
        restore = str(chosen[0].resolve()) if chosen else ""
        self.coordinator = Coordinator(
            config, generation, resume=position, restore=restore, folder=str(folder.path.resolve())
        )
        self._lock = threading.Lock()
        self._signals: deque[int] = deque()
        self._launcher = Launcher(0) if launched else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        allowed = keys.load_server(config.control.keys)
        self._router, self.control, self._gate = router(
            self._context, config.control.host, config.control.port, allowed
        )
        self._restarts = restarts
        try:
            self._http = HttpServer(self._status, config.metrics.host, config.metrics.port)
        except ValueError:
            self._context.destroy(0)
            raise
        folder.metrics.rewind(position["step"] if position else 0, position["epoch"] if position else 0)
        checkpoints.clear(folder.path, chosen[0] if chosen else None)
        self._logs = {worker_id.file: folder.log_size(worker_id.file) for worker_id in config.layout.workers}
        self._progress = Progress(self.coordinator)
        run = {
            "generation": generation,
            "pid": os.getpid(),
            "control": self.control,
            "metrics": self._http.url,
        }
        folder.write("run.json", run)

    def _status(self) -> Status:
        with self._lock:
            return snapshot(self.coordinator, time.monotonic(), self._restarts)

    def on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: the loop takes it from here."""
        self._signals.append(number)

    def run(self) -> int:
        """Until the run is over; returns its exit code."""
        poller = zmq.Poller()
        for source in (self._router, *self._gate.sockets):
            poller.register(source, zmq.POLLIN)
        if self._launcher is not None:
            poller.register(self._launcher.descriptor, zmq.POLLIN)
        try:
            self._loop(poller)
        except Exception as error:  # a mistake in here must end the run, and be readable afterwards
            self._crashed(error)
        finally:
            self._progress.close()
            self._gate.close()
            self._router.close(FLUSH_MS)
            self._http.close()
            self.folder.metrics.close()
            self._context.term()
        assert self.outcome is not None
        return self._conclude(self.outcome)

    def _loop(self, poller: zmq.Poller) -> None:
        tick = time.monotonic()
        while self.outcome is None:
            ready = dict(poller.poll(max(0, math.ceil((tick - time.monotonic()) * 1000))))
            while self._signals:
                self._handle(Signal("coordinator", self._signals.popleft()))
            if self._launcher is not None and self._launcher.descriptor in ready:
                for event in self._launcher.events():
                    self._handle(event)
                if not self._launcher.open:
                    poller.unregister(self._launcher.descriptor)
                    self._launcher = None
            for turned_away in self._gate.events():
                self._handle(turned_away)
            if self._router in ready:
                self._receive()
            for event in self._publisher.events():
                self._handle(event)
            if time.monotonic() >= tick:
                self._handle(Tick())
                self._progress.update(time.monotonic())
                tick = time.monotonic() + TICK_S

    def _crashed(self, error: Exception) -> None:
        text = f"the coordinator failed: {type(error).__name__}: {error}"
        crash = replace(failure(Cause.COORDINATOR, text), traceback=traceback.format_exc())
        self.outcome = Outcome(1, text, crash)
        frame = encode(Abort(reason=text[:1000]))
        for member in self.coordinator.ordered():
            self._sent(member.peer, frame)

    def _receive(self) -> None:
        for _ in range(BURST):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event: Event
            try:
                if len(parts) != 2:
                    raise ProtocolError(f"{len(parts) - 1} frames instead of one")
                event = Received(parts[0], decode(parts[1]))
            except ProtocolError:
                event = Garbage()
            self._handle(event)

    def _handle(self, event: Event) -> None:
        """Hand an event to the coordinator, and the events that its commands cause."""
        pending = deque([event])
        if self._trap is not None:
            steps = [member.step for member in self.coordinator.members.values()]
            self._trap.spring(self.coordinator.state, max(steps, default=0))
        while pending:
            with self._lock:
                commands = self.coordinator.handle(pending.popleft(), time.monotonic())
            for command in commands:
                pending.extend(self._execute(command))

    def _execute(self, command: Command) -> list[Event]:
        match command:
            case Send(peers, message):
                frame = encode(message)
                return [Unreachable(peer) for peer in peers if not self._sent(peer, frame)]
            case Record(row):
                try:
                    self.folder.metrics.append(row | {"time": time.time()})
                except OSError as error:
                    return [NotWritten("metrics.jsonl", str(error))]
            case Say():
                self._progress.say(command)
            case Commit() | Discard():
                self._publisher.put(command)
            case Finish(outcome):
                self.outcome = outcome
        return []

    def _sent(self, peer: bytes, frame: bytes) -> bool:
        """Whether the message is on its way; a peer that is gone or does not read never blocks."""
        try:
            self._router.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def _publish(self, command: Commit | Discard) -> Event | None:
        """Runs in the publisher's thread."""
        source = checkpoints.folder_for(self.folder.path, command.step, command.unique)
        if isinstance(command, Discard):
            shutil.rmtree(source, ignore_errors=True)
            return None
        begin = time.monotonic()
        try:
            if self._trap is not None:
                self._trap.spring("commit", command.step)
            checkpoints.commit(source, self._manifest(command), self.config.checkpoint.keep)
            if self._trap is not None:
                self._trap.spring("committed", command.step)
        except Exception as error:  # whatever it is, the coordinator must hear of it
            return NotWritten("checkpoint", f"{type(error).__name__}: {error}")
        size = sum(int(file["bytes"]) for file in command.files)
        return Committed(command.step, size, command.seconds + time.monotonic() - begin)

    def _manifest(self, command: Commit) -> dict[str, Any]:
        members = self.coordinator.ordered()
        return {
            "step": command.step,
            "epoch": command.epoch,
            "position": command.position,
            "method": self.config.run.method,
            "stages": self.config.pipeline.stages,
            "config": self.config.digest(),
            "versions": {"scpl_dist": VERSION, "torch": members[0].hello.torch},
            "files": command.files,
            "best": command.best,
            "due": command.due,
            "recipe": self.config.recipe(),
            "created": time.time(),
        }

    def _conclude(self, outcome: Outcome) -> int:
        found = outcome.failure
        if found is not None:
            self._write_events()
        if found is not None and found.cause is Cause.DIED and found.rank is not None:
            # Whoever died before it could report may have left its reason in the log.
            name = self.config.layout.workers[found.rank].file
            words = self.folder.last_words(name, self._logs[name])
            outcome = replace(outcome, failure=replace(found, traceback=words))
        try:
            self.folder.finish(outcome)
        except OSError as error:  # a full disk must not hide why the run ended
            print(f"warning: exit.json could not be written: {error}", file=sys.stderr)
        if outcome.failure is not None:
            rank = outcome.failure.rank
            file = None if rank is None else self.config.layout.workers[rank].file
            text = failure_text(outcome.failure, self.folder.log, file)
            if self._may_restart:
                text = text.replace("The run failed.", "This start of the run failed.", 1)
            print(text, file=sys.stderr, flush=True)
        else:
            print(summary(outcome, self.folder.path), flush=True)
        return outcome.code

    def _write_events(self) -> None:
        """What led to a failure, event by event."""
        try:
            write_text(self.folder.log / "events.jsonl", "\n".join(self.coordinator.log.lines()) + "\n")
        except OSError as error:
            print(f"warning: log/events.jsonl could not be written: {error}", file=sys.stderr)


def alone(config: Config, run_dir: Path | None, resume: str) -> int:
    """Run the service on its own, without a launcher: the workers come when they come.

    With ``control.port = 0`` the port is the one that workers expect. Returns the exit code of the run.

    Raises:
        ValueError: the folder cannot be used.
    """
    fixed = config.model_copy(update={"control": config.control.fixed()})
    folder = RunFolder.create(run_dir, fixed, resume=resume != "never")
    folder.remove("run.json", "exit.json", "result.json")
    return serve(str(folder.path), uuid.uuid4().hex, resume)


def serve(
    run_dir: str,
    generation: str,
    resume: str = "never",
    restarted: Sequence[str] = (),
    launched: bool = False,
    may_restart: bool = False,
) -> int:
    """Be the coordinator of the run in a folder, whose ``config.toml`` is the configuration.

    Args:
        run_dir: the run's folder.
        generation: unique name of this start of the run.
        resume: "never", "auto" or the folder of a checkpoint or run.
        restarted: what ended each earlier start of this run.
        launched: whether a launcher is at the other end of standard input.
        may_restart: whether the launcher may start the run again after a failure.

    Returns:
        The exit code of the run.
    """
    try:
        config = configuration.load(Path(run_dir, "config.toml"))
        folder = RunFolder.open_for_writing(Path(run_dir))
        service = Service(config, folder, generation, resume, Counter(restarted), launched, may_restart)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        cause = Cause.CHECKPOINT if isinstance(error, CheckpointError) else Cause.CONFIG
        code = MEANING[cause].code
        with contextlib.suppress(ValueError, OSError):  # the folder may be the problem, as the message says
            RunFolder(Path(run_dir)).fail(code, str(error), cause)
        return code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, service.on_signal)
    return service.run()
