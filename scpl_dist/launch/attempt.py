"""One start of a run: a coordinator, the workers of all stages, and nothing left of them.

    Attempt
      |-- coordinator     told of signals and of workers that exited; asks for others in their place
      |-- worker 0
      '-- worker 1 ...    each dies with this process

The attempt is the watchdog outside of all others: when the coordinator has ended, for whatever reason, the workers
get a moment to end too and are killed then, and the other way round. Others may have joined the run: while the
coordinator says that it has some, it is not alone.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence

import psutil

from scpl_dist.coordinator.restarts import End
from scpl_dist.launch.coordinator_process import CoordinatorProcess, conclude
from scpl_dist.launch.process import Order, ended, kill, start
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, meaning
from scpl_dist.run.layout import WorkerId
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.stacks import SIGNAL as STACKS

# Seconds that the rest has to end after its first part ended: in order, and after a failure.
_GRACE_S = 10.0
_FAILED_GRACE_S = 3.0
_LOOK_S = 1.0  # more between two looks, which are 0.05 s apart, does not count as time


class Attempt:
    """The processes of one start, from the checkpoint `restore` if it is not empty.

    `signals` are the numbers of those that the launcher has got, and grows meanwhile.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        restore: str,
        causes: Sequence[str],
        may_restart: bool,
        signals: Sequence[int],
    ) -> None:
        self._config = config
        self._folder = folder
        self._signals = signals
        self._before = len(causes)  # failures that earlier starts have survived, or ended with
        self._told = 0
        self._deadline = float("inf")
        self._coordinator = CoordinatorProcess(folder, start, restore, causes, may_restart)
        self._code: int | None = None  # of the coordinator
        self._endpoint: str | None = None  # of the control plane
        self._workers: dict[
            int, tuple[int, psutil.Process]
        ] = {}  # that have not ended, by pid: with their ranks
        self._alone = 0.0  # seconds for which there have been none, and the coordinator has told of no others
        self._looked = time.monotonic()
        self._unresponsive = 0.0  # seconds for which the coordinator has been seen to be stopped

    def run(self) -> End:
        try:
            endpoint = self._coordinator.endpoint(self._look)
            if endpoint is None:
                kill([self._coordinator.process])
            else:
                self._start_workers(endpoint)
            while self._look():
                time.sleep(0.05)
        finally:
            kill([process for _, process in self._workers.values()])
        end = self._conclude()
        self._coordinator.close()
        return end

    def _start_workers(self, endpoint: str) -> None:
        self._endpoint = endpoint
        for worker in self._config.layout.workers:
            self._start_worker(worker)

    def _start_worker(self, worker: WorkerId) -> None:
        size, rank = str(self._config.layout.world), str(worker.rank)
        order = Order(
            entry="scpl_dist.launch.rank:local",
            arguments={"run_dir": str(self._folder.path), "control": self._endpoint},
            title=f"scpl-dist: stage {worker.label} {self._folder.path}",
            environment={"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
            log=str(self._folder.log / f"{worker.file}.log"),
        )
        process = start(order)
        self._workers[process.pid] = worker.rank, process

    def _replace(self, rank: int, pid: int | None) -> None:
        """Start a worker in place of one that is lost: it may still run, stopped or cut off."""
        if pid in self._workers:
            kill([self._workers.pop(pid)[1]])
        self._start_worker(self._config.layout.workers[rank])

    def _look(self) -> bool:
        """Act on what happened since the last look; whether something still runs, and may."""
        for number in self._signals[self._told :]:
            self._coordinator.tell({"event": "signal", "number": number})
            self._told += 1
        if self._told > 1:
            self._end_within(_FAILED_GRACE_S)
        for pid, (rank, process) in list(self._workers.items()):
            code = ended(process)
            if code is not None:
                del self._workers[pid]
                self._coordinator.tell({"event": "exited", "rank": rank, "code": code, "pid": pid})
        now = time.monotonic()
        # More, if this process was stopped itself, perhaps with the others.
        passed = min(now - self._looked, _LOOK_S)
        self._looked = now
        heard = self._coordinator.heard()
        for said in heard:
            if said["event"] == "replace" and self._code is None and self._told == 0:
                self._replace(said["rank"], said["pid"])
        self._notice_emptiness(passed, others=bool(heard))
        if self._code is None:
            self._look_at_coordinator(passed)
        running = self._code is None or bool(self._workers)
        return running and time.monotonic() < self._deadline

    def _notice_emptiness(self, passed: float, others: bool) -> None:
        """Without workers nothing is left to do but to conclude, unless others are waited for."""
        self._alone = 0.0 if self._workers or others or self._endpoint is None else self._alone + passed
        patience = self._config.runtime.replace_s if self._config.runtime.max_restarts else 0.0
        if self._code is None and self._alone >= _GRACE_S + patience:
            self._end_within(0)

    def _look_at_coordinator(self, passed: float) -> None:
        self._code = ended(self._coordinator.process)
        if self._code == 0:
            self._end_within(_GRACE_S)
        elif self._code is not None:
            if self._code == 1:
                self._dump_stacks()
            # After a kill, the workers would need a moment to notice, and nobody is there to hear from them.
            self._end_within(_FAILED_GRACE_S if self._code > 0 else 0)
        self._unresponsive = self._unresponsive + passed if self._code is None and self._is_stopped() else 0.0
        if self._unresponsive >= self._config.runtime.timeout_s:
            self._end_within(0)

    def _is_stopped(self) -> bool:
        """Whether the coordinator is, for example by SIGSTOP; it cannot notice anything then."""
        return self._coordinator.process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _dump_stacks(self) -> None:
        """Workers that still run after a failure write their stacks, also those that hold the interpreter lock."""
        exit_json = self._folder.read("exit.json") or {}
        if meaning(exit_json.get("cause") or "").stacks:
            for _, process in self._workers.values():
                process.send_signal(STACKS)

    def _conclude(self) -> End:
        """How it ended; writes exit.json, and says it, where the coordinator could not."""
        loss = self._loss()
        step = self._folder.metrics.last_step(bool(self._config.block))
        found = self._folder.read("exit.json")
        if found is not None:  # it may have ended the run, and not have come to its own end
            return End.of(found, step)
        # A coordinator that was killed has left what it survived in its rows alone.
        rows = [row for row in self._folder.metrics.rows() if row["event"] == "restart"]
        survived = tuple(str(row["cause"]) for row in rows[self._before :])
        cause = None
        if self._code is not None and -self._code in (signal.SIGTERM, signal.SIGINT):
            # It still loaded, so nothing has begun.
            code = 128 - self._code
            reason = f"stopped by {signal.Signals(-self._code).name} before the first step"
            text = reason
        elif self._told > 1:
            code = 128 + self._signals[-1]
            reason = f"stopped at once by a second signal; {loss}"
            text = ""
        else:
            cause = Cause.CONFIG if self._code == 2 else Cause.COORDINATOR_LOST
            code = meaning(cause).code
            reason = loss
            text = f"\nThe run failed.\n  log:        {self._folder.log}\n  cause:      {reason}"
        conclude(self._folder, code, reason, cause)
        if text:
            print(text, file=sys.stderr)
        return End(code, cause or "", reason, None, step, survived)

    def _loss(self) -> str:
        """What became of the coordinator, if it has not said it; afterwards it is gone."""
        process, code = self._coordinator.process, self._code
        if code is None:
            what = "is stopped (by SIGSTOP or a debugger)" if self._is_stopped() else "did not finish the run"
            kill([process])
            return f"the coordinator (pid {process.pid}) {what}, and the workers ended without it"
        if code < 0:
            return f"the coordinator (pid {process.pid}) was killed by {signal.Signals(-code).name}"
        return (
            f"the coordinator exited with code {code} before it could finish the run; see what it said above"
        )
