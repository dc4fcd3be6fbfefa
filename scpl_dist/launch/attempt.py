"""One start of a run: a coordinator, the workers of all stages, and nothing left of them.

    Attempt
      |-- coordinator     told over its standard input of signals and of workers that exited
      |-- worker 0
      '-- worker 1 ...    each dies with the server that it was forked from, and the server with this process

The attempt is the watchdog outside of all others: when the coordinator has ended, for whatever reason, the workers
get a moment to end too and are killed then, and the other way round.
"""

from __future__ import annotations

import queue
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from scpl_dist.launch.child import Order
from scpl_dist.launch.children import Children
from scpl_dist.launch.coordinator_process import CoordinatorProcess
from scpl_dist.launch.restarts import End
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, meaning
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.stacks import SIGNAL as STACKS

# Seconds that the rest has to end after its first part ended: in order, and after a failure.
_GRACE_S = 10.0
_FAILED_GRACE_S = 3.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Signalled:
    """The launcher got a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has ended; a negative code is the number of the signal that killed it."""

    pid: int
    code: int


Event = Signalled | Ended


class Attempt:
    """The processes of one start.

    Args:
        config: the run.
        folder: its folder.
        resume: what the coordinator is told: "never", "auto" or a folder.
        causes: what ended the earlier starts.
        children: starts the processes.
        events: what `children` and signals say; shared by all starts of a run.
        may_restart: whether a failure may be followed by another start.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resume: str,
        causes: Sequence[str],
        children: Children,
        events: queue.SimpleQueue[Event],
        may_restart: bool,
    ) -> None:
        self.config = config
        self.folder = folder
        self._children = children
        self._events = events
        self._deadline: float | None = None
        self._stopped_since: float | None = None
        self._signals: list[int] = []
        self._code: int | None = None
        """Exit code of the coordinator."""
        self._ranks: dict[int, int] = {}
        """Workers that have not ended: rank by process id."""
        self._coordinator = CoordinatorProcess(folder, resume, causes, may_restart)
        with self._coordinator.stdin as stdin:
            self._pid = children.start(self._coordinator.order, stdin)

    def run(self) -> End:
        """Until everything has ended."""
        try:
            endpoint = self._coordinator.endpoint(self._waiting)
            if endpoint is not None:
                self._start_workers(endpoint)
            elif self._code is None:
                self._children.send([self._pid], signal.SIGKILL)
            self._supervise()
        finally:
            self._kill_rest()
        end = self._conclude()
        self._coordinator.close()
        return end

    def _waiting(self) -> bool:
        """Whether the coordinator still starts; meanwhile events are passed on to it."""
        while not self._events.empty():
            self._heard(self._events.get())
        return self._code is None

    def _start_workers(self, endpoint: str) -> None:
        workers = self.config.layout.workers
        for worker in workers:
            order = Order(
                entry="scpl_dist.launch.rank:local",
                arguments={"run_dir": str(self.folder.path), "control": endpoint},
                title=f"scpl-dist: stage {worker.label} {self.folder.path}",
                environment={
                    "RANK": str(worker.rank),
                    "LOCAL_RANK": str(worker.rank),
                    "WORLD_SIZE": str(len(workers)),
                    "LOCAL_WORLD_SIZE": str(len(workers)),
                },
                log=str(self.folder.log / f"{worker.file}.log"),
            )
            self._ranks[self._children.start(order)] = worker.rank

    # Supervision ------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Pass events on until coordinator and workers have ended, or the grace is over."""
        while self._code is None or self._ranks:
            try:
                self._heard(self._events.get(timeout=_LOOK_S))
            except queue.Empty:
                self._look_at_coordinator()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return

    def _heard(self, event: Event) -> None:
        match event:
            case Signalled(number):
                self._signals.append(number)
                self._coordinator.tell({"event": "signal", "number": number})
                if len(self._signals) > 1:
                    self._end_within(_FAILED_GRACE_S)
            case Ended(pid, code) if pid == self._pid:
                self._code = code
                if code == 1:
                    self._dump_stacks()
                # After a kill, the workers would need a moment to notice, and nobody is there to hear from them.
                self._end_within(_GRACE_S if code == 0 else _FAILED_GRACE_S if code > 0 else 0)
            case Ended(pid, code) if pid in self._ranks:
                self._coordinator.tell({"event": "exited", "rank": self._ranks.pop(pid), "code": code})
                if not self._ranks:
                    self._end_within(_GRACE_S)
            case _:
                pass  # the last word of an earlier start

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _look_at_coordinator(self) -> None:
        """A coordinator that is stopped, for example by SIGSTOP, cannot notice anything any more."""
        if self._code is not None or not self._is_stopped():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = time.monotonic()
        elif time.monotonic() - self._stopped_since >= self.config.runtime.timeout_s:
            self._end_within(0)

    def _is_stopped(self) -> bool:
        try:
            status = psutil.Process(self._pid).status()
        except psutil.NoSuchProcess:
            return False
        return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

    def _dump_stacks(self) -> None:
        """Workers that still run after a failure write their stacks, also those that hold the interpreter lock."""
        exit_json = self.folder.read("exit.json") or {}
        if meaning(exit_json.get("cause") or "").stacks:
            self._children.send([*self._ranks], STACKS)

    def _kill_rest(self) -> None:
        """No worker outlives its attempt."""
        deadline = time.monotonic() + _GRACE_S
        while self._ranks and time.monotonic() < deadline:
            self._children.send([*self._ranks], signal.SIGKILL)
            try:
                self._heard(self._events.get(timeout=0.1))
            except queue.Empty:
                pass

    # End --------------------------------------------------------------------------------------------------------

    def _conclude(self) -> End:
        """How it ended; writes exit.json, and says it, where the coordinator could not."""
        step = self.folder.metrics.last_step(self.config.pipeline.stages)
        if self._code is None:
            what = "is stopped (by SIGSTOP or a debugger)" if self._is_stopped() else "did not finish the run"
            reason = f"the coordinator (pid {self._pid}) {what}, and the workers ended without it"
            self._children.send([self._pid], signal.SIGKILL)
        elif (found := self.folder.read("exit.json")) is not None:
            return End(found["code"], found.get("cause", ""), found["reason"], found.get("stage"), step)
        elif -self._code in (signal.SIGTERM, signal.SIGINT):  # it still loaded, so nothing has begun
            code = 128 - self._code
            reason = f"stopped by {signal.Signals(-self._code).name} before the first step"
            print(reason, file=sys.stderr)
            self.folder.fail(code, reason)
            return End(code, "", reason, None, step)
        elif self._code < 0:
            name = signal.Signals(-self._code).name
            reason = f"the coordinator (pid {self._pid}) was killed by {name}"
        else:
            reason = f"the coordinator exited with code {self._code} before it could finish the run"
        if len(self._signals) > 1:
            code, cause, reason = (
                128 + self._signals[-1],
                None,
                f"stopped at once by a second signal; {reason}",
            )
        else:
            cause = Cause.CONFIG if self._code == 2 else Cause.COORDINATOR_LOST
            code = meaning(cause).code
            print(
                f"\nThe run failed.\n  log:        {self.folder.log}\n  cause:      {reason}", file=sys.stderr
            )
        self.folder.fail(code, reason, cause)
        return End(code, cause or "", reason, None, step)
