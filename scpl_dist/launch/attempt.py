"""One start of a run: a coordinator, torch's elastic agent with the workers of all stages, and nothing left of them.

    Group
      |-- coordinator              told over its standard input of signals and of workers that exited
      '-- torch's elastic agent    (a thread) starts the workers, stops all when one fails
             |-- worker 0          each dies with this process (PR_SET_PDEATHSIG)
             '-- worker 1 ...

The group is the watchdog outside of all others: when the coordinator has ended, for whatever reason, the workers get
a moment to end too and are killed then, and the other way round.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scpl_dist.launch import processes
from scpl_dist.launch.coordinator_process import CoordinatorProcess
from scpl_dist.launch.restarts import End
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, meaning
from scpl_dist.run.network import loopback
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker import stacks

# Seconds that the rest of the group has to end after its first part ended: in order, and after a failure.
_GRACE_S = 10.0
_FAILED_GRACE_S = 3.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Signalled:
    """The launcher got a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class _CoordinatorEnded:
    generation: str
    code: int


@dataclass(frozen=True, slots=True)
class _WorkerEnded:
    generation: str
    rank: int
    code: int | None


@dataclass(frozen=True, slots=True)
class _WorkersEnded:
    generation: str
    codes: dict[int, int]
    """Exit codes by rank, of those that failed; a negative one is the number of the signal."""
    error: str = ""


Event = Signalled | _CoordinatorEnded | _WorkerEnded | _WorkersEnded


class Attempt:
    """The processes of one start.

    Args:
        config: the run.
        folder: its folder.
        resume: what the coordinator is told: "never", "auto" or a folder.
        causes: what ended the earlier starts.
        events: where signals come from; shared by all starts of a run.
        may_restart: whether a failure may be followed by another start.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resume: str,
        causes: Sequence[str],
        events: queue.SimpleQueue[Event],
        may_restart: bool,
    ) -> None:
        self.config = config
        self.folder = folder
        self._events = events
        self._over = threading.Event()
        self._code: int | None = None
        self._ended: _WorkersEnded | None = None
        self._deadline: float | None = None
        self._stopped_since: float | None = None
        self._signals: list[int] = []
        self._coordinator = self._start_coordinator(resume, causes, may_restart)
        self.generation = self._coordinator.generation

    def run(self) -> End:
        """Until everything has ended."""
        try:
            endpoint = self._coordinator.endpoint()
            if endpoint is not None:
                self._start_workers(endpoint)
            elif self._coordinator.wait(0) is None:
                self._coordinator.kill()
            self._supervise(workers=endpoint is not None)
        finally:
            self._over.set()
            self._kill_rest()
        return self._conclude()

    # Start ------------------------------------------------------------------------------------------------------

    def _start_coordinator(self, resume: str, causes: Sequence[str], may_restart: bool) -> CoordinatorProcess:
        coordinator = CoordinatorProcess(self.folder, resume, causes, may_restart)

        def wait() -> None:
            code = coordinator.wait()
            assert code is not None
            self._events.put(_CoordinatorEnded(coordinator.generation, code))

        threading.Thread(target=wait, name="coordinator", daemon=True).start()
        return coordinator

    def _start_workers(self, endpoint: str) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # The agent's own reports name no stage and would come last on the screen; ours does and shall.
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        interface = self.config.runtime.interface or loopback()
        os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["OMP_NUM_THREADS"] = str(self.config.runtime.threads)
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.config.layout.world,
            run_id=self.generation,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"timeout": int(self.config.runtime.timeout_s) + 1},
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=3,
            logs_specs=DefaultLogsSpecs(log_dir=str(self.folder.log / "agent")),  # not in the machine's /tmp
        )
        config_file = str(self.folder.path / "config.toml")
        command = ["-m", "scpl_dist", "worker", config_file, "--run-dir", str(self.folder.path)]
        command += ["--control", endpoint, "--no-coordinator", "--log-to-folder"]

        def run_agent() -> None:
            codes, text = {}, ""
            try:
                elastic_launch(launch_config, sys.executable)(*command)
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            except Exception as error:  # the agent itself failed: said, instead of lost with the thread
                text = f"{type(error).__name__}: {error}"
            self._events.put(_WorkersEnded(self.generation, codes, text))

        threading.Thread(target=run_agent, name="agent", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """Tell at once when a worker ends: the agent tells only when it has ended the others, too."""

        def wait(pid: int, rank: int) -> None:
            self._events.put(_WorkerEnded(self.generation, rank, processes.exit_code(pid)))

        found: dict[int, int] = {}
        while len(found) < self.config.layout.world and not self._over.wait(0.05):
            for pid in self._workers():
                if pid not in found:
                    found[pid] = int(processes.environment(pid).get("RANK", "0"))
                    threading.Thread(target=wait, args=(pid, found[pid]), daemon=True).start()

    def _workers(self) -> list[int]:
        """Process ids of the living workers of this start: a user's program may have other children."""
        environments = {pid: processes.environment(pid) for pid in processes.children()}
        return [
            pid for pid, found in environments.items() if found.get("TORCHELASTIC_RUN_ID") == self.generation
        ]

    # Supervision ------------------------------------------------------------------------------------------------

    def _supervise(self, workers: bool) -> None:
        """Pass events on until coordinator and workers have ended, or the grace is over."""
        if not workers:
            self._ended = _WorkersEnded(self.generation, {})
        while self._code is None or self._ended is None:
            try:
                event = self._events.get(timeout=_LOOK_S)
            except queue.Empty:
                self._look_at_coordinator()
            else:
                self._heard(event)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return

    def _heard(self, event: Event) -> None:
        if not isinstance(event, Signalled) and event.generation != self.generation:
            return  # the last word of an earlier start
        match event:
            case Signalled(number):
                self._signals.append(number)
                self._coordinator.tell({"event": "signal", "number": number})
                if len(self._signals) > 1:
                    self._end_within(_FAILED_GRACE_S)
            case _CoordinatorEnded(_, code):
                self._code = code
                if code == 1:
                    self._dump_stacks()
                # After a kill, the workers would need a moment to notice, and nobody is there to hear from them.
                self._end_within(_GRACE_S if code == 0 else _FAILED_GRACE_S if code > 0 else 0)
            case _WorkerEnded(_, rank, code):
                if code is not None:
                    self._coordinator.tell({"event": "exited", "rank": rank, "code": code})
            case _WorkersEnded(_, codes, error):
                self._ended = event
                for rank, code in codes.items():
                    self._coordinator.tell({"event": "exited", "rank": rank, "code": code})
                if error:
                    self._coordinator.tell({"event": "exited", "rank": 0, "code": 1})
                self._end_within(_GRACE_S)

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _look_at_coordinator(self) -> None:
        """A coordinator that is stopped, for example by SIGSTOP, cannot notice anything any more."""
        if self._code is not None or processes.state(self._coordinator.pid) is None:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = time.monotonic()
        elif time.monotonic() - self._stopped_since >= self.config.runtime.timeout_s:
            self._end_within(0)

    def _dump_stacks(self) -> None:
        """Workers that still run after a failure write their stacks, also those that hold the interpreter lock."""
        exit_json = self.folder.read("exit.json") or {}
        if meaning(exit_json.get("cause") or "").stacks:
            processes.send(self._workers(), stacks.SIGNAL)

    def _kill_rest(self) -> None:
        """Nothing of this group outlives it."""
        processes.send(self._workers(), signal.SIGKILL)
        deadline = time.monotonic() + _GRACE_S
        while self._ended is None and time.monotonic() < deadline:
            try:
                self._heard(self._events.get(timeout=0.1))
            except queue.Empty:
                processes.send(self._workers(), signal.SIGKILL)

    # End --------------------------------------------------------------------------------------------------------

    def _conclude(self) -> End:
        """How it ended; writes exit.json, and says it, where the coordinator could not."""
        step = self.folder.last_step(self.config.pipeline.stages)
        if self._code is None:
            state = processes.state(self._coordinator.pid)
            what = f"is {state}" if state else "did not finish the run"
            reason = f"the coordinator (pid {self._coordinator.pid}) {what}, and the workers ended without it"
            self._coordinator.kill()
        elif (found := self.folder.read("exit.json")) is not None:
            return End(self._code, found.get("cause", ""), found["reason"], found.get("stage"), step)
        elif -self._code in (signal.SIGTERM, signal.SIGINT):  # it still loaded, so nothing has begun
            code, reason = (
                128 - self._code,
                f"stopped by {signal.Signals(-self._code).name} before the first step",
            )
            print(reason, file=sys.stderr)
            self.folder.fail(code, reason)
            return End(code, "", reason, None, step)
        elif self._code < 0:
            name = signal.Signals(-self._code).name
            reason = f"the coordinator (pid {self._coordinator.pid}) was killed by {name}"
        else:
            reason = f"the coordinator exited with code {self._code} before it could finish the run"
        if self._ended is not None and self._ended.error:
            reason += f"; the elastic agent said: {self._ended.error}"
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
