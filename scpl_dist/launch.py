"""The local launcher: a coordinator and all workers on this machine, and nothing left of them afterwards.

    scpl-dist train ---- preflight: configuration, data, model, ports, run folder (exit 2 before anything starts)
        |-- coordinator              told over its standard input of signals and of workers that exited
        '-- torch's elastic agent    (a thread) starts a worker for each stage, stops all when one fails
               |-- worker 0
               '-- worker 1 ...      each dies with this process (PR_SET_PDEATHSIG)

The launcher itself decides nothing about training. It passes signals on and makes sure that everything ends.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from scpl_dist.companion import Companion
from scpl_dist.config import Config
from scpl_dist.network import loopback, resolve
from scpl_dist.run_folder import RunFolder

if TYPE_CHECKING:
    from scpl_dist.data import DataSource

__all__ = ["launch", "preflight"]

# Seconds that the rest of the group has to end after its first part ended.
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int


@dataclass(frozen=True, slots=True)
class _CoordinatorEnded:
    code: int


@dataclass(frozen=True, slots=True)
class _WorkersEnded:
    codes: dict[int, int]
    """Exit codes by rank, of those that failed; a negative one is the number of the signal."""
    error: str = ""


_Event = _Signal | _CoordinatorEnded | _WorkersEnded


def preflight(config: Config, absent: Callable[[str], None] | None = None) -> Any:
    """Find the user's mistakes before any process starts, and decide what is decided once for all processes.

    Args:
        config: the run.
        absent: called with the reason if the files of a published data set cannot be used; everything else is checked
            then. None makes that an error.

    Returns:
        The `scpl_dist.assembly.Assembly` of the run. Its configuration is the one to run: the counts of a measured
        partition are in it.

    Raises:
        ValueError: with the key, the value and the fix.
    """
    from scpl_dist import data
    from scpl_dist.assembly import Assembly

    try:
        source = data.resolve(config)
    except ValueError as error:
        known = data.outline(config)
        if absent is None or known is None or config.pipeline.partition == "measured":
            raise
        absent(str(error))
        return Assembly.plan(config, *known)
    size = source.sizes["train"]
    if config.data.batch_size > size:
        raise ValueError(
            f"data.batch_size = {config.data.batch_size}: the training set of {config.data.name!r} has {size} "
            f"samples; use at most {size}"
        )
    if config.pipeline.partition == "measured":
        config = _measured(config, source)
    assembly = Assembly.plan(config, source.classes, source.example())
    if config.runtime.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError('runtime.device = "cuda": torch sees no GPU here; use "auto" or "cpu"')
    _check_port("metrics", config.metrics.host, config.metrics.port)
    _check_port("control", config.control.host, config.control.port)
    return assembly


def _measured(config: Config, source: DataSource) -> Config:
    """The configuration with the block counts that measuring gives."""
    from scpl_dist import costs
    from scpl_dist.assembly import Assembly

    pipeline = config.pipeline.model_copy(update={"partition": "uniform"})
    plan = Assembly.plan(config.model_copy(update={"pipeline": pipeline}), source.classes, source.example())
    return config.model_copy(
        update={"pipeline": pipeline.model_copy(update={"partition": costs.counts(plan, source)})}
    )


def launch(config: Config, folder: RunFolder, resume: str = "never") -> int:
    """Run to the end.

    Args:
        config: the run, checked by `preflight`.
        folder: an opened run folder.
        resume: "never", "auto" or the folder of a checkpoint.

    Returns:
        The exit code of the contract: 0 done, 1 failed, 2 configuration, 130 or 143 stopped.
    """
    return _Group(config, folder, resume).run()


class _Group:
    """The processes of one launch."""

    def __init__(self, config: Config, folder: RunFolder, resume: str) -> None:
        self.config = config
        self.folder = folder
        self.resume = resume
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.coordinator: Companion | None = None

    def run(self) -> int:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in handlers:
            signal.signal(number, self._on_signal)
        try:
            coordinator = self._start_coordinator()
            endpoint = coordinator.endpoint()
            if endpoint is not None:
                self._start_workers(coordinator.generation, endpoint)
            return self._supervise(workers=endpoint is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.events.put(_Signal(number))

    # Start ------------------------------------------------------------------------------------------------------

    def _start_coordinator(self) -> Companion:
        coordinator = self.coordinator = Companion(self.folder, self.resume)

        def await_end() -> None:
            code = coordinator.wait()
            assert code is not None
            self.events.put(_CoordinatorEnded(code))

        threading.Thread(target=await_end, name="coordinator", daemon=True).start()
        return coordinator

    def _start_workers(self, generation: str, endpoint: str) -> None:
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
            nproc_per_node=self.config.pipeline.stages,
            run_id=generation,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"timeout": int(self.config.runtime.timeout_s) + 1},
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=3,
        )
        config_file = str(self.folder.path / "config.toml")
        command = ["-m", "scpl_dist", "worker", config_file, "--run-dir", str(self.folder.path)]
        command += ["--control", endpoint, "--no-coordinator", "--log-to-folder"]

        def run_agent() -> None:
            try:
                elastic_launch(launch_config, sys.executable)(*command)
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
                self.events.put(_WorkersEnded(codes))
            except (
                Exception
            ) as error:  # the agent itself failed: report it instead of losing it with the thread
                self.events.put(_WorkersEnded({}, f"{type(error).__name__}: {error}"))
            else:
                self.events.put(_WorkersEnded({}))

        threading.Thread(target=run_agent, name="agent", daemon=True).start()

    # Supervision ------------------------------------------------------------------------------------------------

    def _supervise(self, workers: bool) -> int:
        """Pass events on until coordinator and workers have ended, or the grace is over."""
        assert self.coordinator is not None
        code: int | None = None
        ended = None if workers else _WorkersEnded({})
        deadline: float | None = None
        while code is None or ended is None:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = self.events.get(timeout=left)
            except queue.Empty:
                break
            match event:
                case _Signal(number):
                    self.coordinator.tell({"event": "signal", "number": number})
                case _CoordinatorEnded():
                    code = event.code
                    deadline = time.monotonic() + _GRACE_S
                case _WorkersEnded():
                    ended = event
                    deadline = time.monotonic() + _GRACE_S
                    for rank, exit_code in event.codes.items():
                        self.coordinator.tell({"event": "exited", "rank": rank, "code": exit_code})
                    if event.error:
                        self.coordinator.tell(
                            {"event": "exited", "rank": 0, "code": 1, "message": event.error}
                        )
        return self._conclude(code, ended)

    def _conclude(self, code: int | None, ended: _WorkersEnded | None) -> int:
        """The exit code; writes exit.json where the coordinator could not."""
        assert self.coordinator is not None
        if code is None:
            self.coordinator.kill()
            reason = "the workers ended, and the coordinator did not finish the run"
        elif self.folder.read("exit.json") is not None:
            return code
        elif code < 0:
            reason = f"the coordinator was killed by {signal.Signals(-code).name}"
        else:
            reason = f"the coordinator exited with code {code} before it could finish the run"
        if ended is not None and ended.error:
            reason += f"; the elastic agent said: {ended.error}"
        return self.folder.fail(code if code == 2 else 1, reason)


def _check_port(section: str, host: str, port: int) -> None:
    if port == 0:
        return
    address = resolve(host, f"{section}.host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(
                f"{section}.port = {port}: cannot listen on {host}:{port} ({error.strerror}); choose another one, "
                f"or -o {section}.port=0 for any free one"
            ) from None
