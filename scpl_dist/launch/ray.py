"""A run on a Ray cluster: Ray places its processes by what they need, and brings back those that it loses.

    scpl-dist train --on ray ---- Host, an actor ---- spawn ----> coordinator, a service of its own
        '-- driver           '--- Host, an actor ---- spawn ----> worker of rank 0, 1, ...

An actor does no more than to start a process on its node, and to say how that ended. Where a node is lost, Ray makes
the actor again on another one; there it has no process, which the driver sees, and starts one. The driver decides
with `scpl_dist.coordinator.restarts` whether a failure is final, as the local launcher does. All nodes see the run's
folder.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from scpl_dist.coordinator.restarts import End, Restarts
from scpl_dist.launch.coordinator_process import conclude
from scpl_dist.launch.process import Order, call, ended, kill, spawn
from scpl_dist.run.config import Config
from scpl_dist.run.errors import PreflightError
from scpl_dist.run.failures import Cause, meaning
from scpl_dist.run.layout import WorkerId
from scpl_dist.run.network import is_loopback
from scpl_dist.storage.checkpoints import CheckpointError, steps
from scpl_dist.storage.resume import begin
from scpl_dist.storage.run_folder import RunFolder

LOST = 1 << 16  # in place of an exit code: the process went with its node
_LOOK_S = 0.1
# Seconds that workers have to end after the coordinator: in order, and after a failure.
_GRACE_S = 10.0
_FAILED_GRACE_S = 3.0


def train(config: Config, run_dir: Path | None, resume: str = "never") -> tuple[int, RunFolder]:
    """Take a run to its end on the cluster that ``RAY_ADDRESS`` names, or that this node belongs to.

    As `scpl_dist.launch.local.train`; ValueError, too, if Ray is not installed or no cluster is found.
    """
    if isinstance(config.runtime.device, list) or ":" in config.runtime.device:
        fix = 'use "cuda", "cpu" or "auto"'
        raise ValueError(f"runtime.device = {config.runtime.device!r}: Ray gives each worker its GPU; {fix}")
    _, manifest, _ = begin(run_dir, resume, config)
    signals: list[int] = []
    ray = _connected()
    try:
        cluster = Cluster(ray, _checked(config, manifest), signals)
        folder = RunFolder.create(run_dir, config, resume=resume != "never")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        return cluster.train(RunFolder(folder.path.resolve()), resume), folder
    finally:
        ray.shutdown()  # and with it all actors, and their processes


def _checked(config: Config, manifest: dict[str, Any]) -> Config:
    """The configuration of a run without mistakes, with the counts of a measured partition."""
    # This node needs no GPU.
    here = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": "auto"})})
    arguments = {"config": here.model_dump(mode="json"), "position": manifest.get("position")}
    found = call("scpl_dist.launch.preflight:checked", arguments, "scpl-dist: preflight", spawn)
    if found is None:
        raise PreflightError("the check of the run was killed, perhaps because the memory was full")
    return config.model_copy(update={"pipeline": Config.model_validate(found["config"]).pipeline})


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("--on ray: the package ray is not installed: pip install 'scpl_dist[ray]'") from None
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--on ray: no cluster answers ({error}); start one with ray start --head, or set RAY_ADDRESS"
        ) from None
    return ray


class Host:
    """The actor: a process on a node."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):  # relative paths mean the same as for the driver
            os.chdir(folder)
        sys.path.insert(0, os.getcwd())
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, {signal.SIGINT}
        )  # which Ray blocks, and a child inherits that
        self._process: psutil.Process | None = None

    def address(self) -> tuple[str, int]:
        """This node's, as the cluster knows it, and a port that is free there."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as probe:
            return host, probe.getsockname()[1]

    def start(self, order: dict[str, Any]) -> None:
        """Start a process in place of the one before, if that still runs."""
        self.send(signal.SIGKILL)
        self._process = spawn(Order(**order))

    def look(self) -> int | None:
        """Its exit code; None while it runs, `LOST` if there is none here."""
        return LOST if self._process is None else ended(self._process)

    def send(self, number: int) -> None:
        """Send it a signal; SIGKILL waits for its end."""
        if self._process is None or ended(self._process) is not None:
            return
        if number == signal.SIGKILL:
            kill([self._process])
        else:
            self._process.send_signal(number)


class Placed:
    """The driver's end of a `Host`, which Ray keeps on a node that has what it needs."""

    def __init__(self, ray: Any, **options: Any) -> None:
        self._ray = ray
        made = ray.remote(Host).options(max_restarts=-1, max_task_retries=-1, **options)
        self._actor = made.remote(os.getcwd())
        self._asked: Any = None

    def address(self) -> tuple[str, int]:
        host, port = self._ray.get(self._actor.address.remote())
        return host, port

    def start(self, order: Order) -> None:
        """At once, or as soon as there is a node."""
        self._actor.start.remote(asdict(order))
        self._asked = None  # an answer that is still to come is about the process before

    def look(self) -> int | None:
        """As `Host.look`; None, too, while nobody answers."""
        if self._asked is None:
            self._asked = self._actor.look.remote()
        done, _ = self._ray.wait([self._asked], timeout=0)
        if not done:
            return None
        [asked], self._asked = done, None
        code: int | None = self._ray.get(asked)
        return code

    def send(self, number: int) -> None:
        self._actor.send.remote(number)


class Cluster:
    """The places of a run; `signals` are those that the driver has got, and grows meanwhile."""

    def __init__(self, ray: Any, config: Config, signals: list[int]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._config = config
        self._signals = signals
        self._told = 0
        self._coordinator = Placed(ray, num_cpus=0, scheduling_strategy=here)
        self._controlled(*self._coordinator.address())  # raises if it may not be there without keys
        needs = _needs(config, ray.cluster_resources())
        self._workers = {worker: Placed(ray, **needs) for worker in config.layout.workers}

    def _controlled(self, host: str, port: int) -> Config:
        """The configuration with the coordinator's address."""
        values = self._config.model_dump(mode="json")
        values["control"] |= {"host": host, "port": values["control"]["port"] or port}
        try:
            return Config.model_validate(values)
        except ValueError as error:
            [problem] = error.errors()  # type: ignore[attr-defined]
            raise ValueError(str(problem["ctx"]["error"])) from None

    def train(self, folder: RunFolder, resume: str) -> int:
        """All starts of a run; returns the exit code of the last one."""
        restarts = Restarts(self._config.runtime.max_restarts)
        while True:
            end = self._attempt(folder, resume)
            if end.code != 1 or self._signals:
                return end.code
            refusal = restarts.refusal(end)
            if refusal is not None:
                if restarts.limit:
                    print(f"scpl-dist: {refusal}\n  cause:      {end.reason}", file=sys.stderr, flush=True)
                return end.code
            resume = "auto" if resume == "never" or steps(folder.path) else resume
            number = len(restarts.causes)
            print(f"restart {number} of {restarts.limit}: {end.reason}", file=sys.stderr, flush=True)

    def _attempt(self, folder: RunFolder, resume: str) -> End:
        before, ended_before = folder.read("run.json"), _written(folder)
        host, port = self._coordinator.address()
        config = self._controlled(host, port).model_dump(mode="json")
        arguments = {"config": config, "run_dir": str(folder.path), "resume": resume}
        log = folder.log / "coordinator.log"
        said = log.stat().st_size if log.exists() else 0
        title = f"scpl-dist: coordinator {folder.path}"
        entry = "scpl_dist.launch.ray:coordinate"
        self._coordinator.start(Order(entry, arguments, title, log=str(log)))
        endpoint = ""
        while (code := self._coordinator.look()) is None:
            self._pass_signals_on()
            if not endpoint and (run := folder.read("run.json")) not in (before, None):
                endpoint = run["control"]
                for worker in self._workers:
                    self._start(worker, folder, endpoint, host)
            for worker, placed in self._workers.items():
                # Ray has brought it back, or it has failed: it says hello again, to whoever coordinates then.
                if endpoint and placed.look() not in (None, 0):
                    self._start(worker, folder, endpoint, host)
            said = _repeat(log, said)
            time.sleep(_LOOK_S)
        self._end_workers(_FAILED_GRACE_S if code == 1 else _GRACE_S)
        _repeat(log, said)
        return self._end(folder, code, ended_before)

    def _start(self, worker: WorkerId, folder: RunFolder, endpoint: str, host: str) -> None:
        world = self._config.layout.world
        alone = world if is_loopback(host) else 1
        environment: dict[str, object] = {
            "RANK": worker.rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": alone,
        }
        environment |= {"OMP_NUM_THREADS": self._config.runtime.threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        order = Order(
            entry="scpl_dist.launch.rank:local",
            arguments={"run_dir": str(folder.path), "control": endpoint},
            title=f"scpl-dist: stage {worker.label} {folder.path}",
            environment={name: str(value) for name, value in environment.items()},
            log=str(folder.log / f"{worker.file}.log"),
        )
        self._workers[worker].start(order)

    def _pass_signals_on(self) -> None:
        for number in self._signals[self._told :]:
            self._told += 1
            self._coordinator.send(number if self._told == 1 else signal.SIGKILL)

    def _end_workers(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        left = list(self._workers.values())
        while left and time.monotonic() < deadline:
            left = [placed for placed in left if placed.look() is None]
            time.sleep(_LOOK_S)
        for placed in left:
            placed.send(signal.SIGKILL)

    def _end(self, folder: RunFolder, code: int, before: tuple[int, int] | None) -> End:
        """How it ended, by the exit.json that was not there `before`; writes one where the coordinator could not."""
        step = folder.metrics.last_step(bool(self._config.block))
        found = folder.read("exit.json")
        if found is not None and _written(folder) != before:
            return End.of(found, step)
        if code == 2:  # it has said why, and has changed nothing
            return End(2, Cause.CONFIG, "see what it said above", None, step)
        if len(self._signals) > 1:
            number = self._signals[-1]
            conclude(folder, 128 + number, "stopped at once by a second signal")
            return End(128 + number, "", "stopped at once by a second signal", None, step)
        reason = "the coordinator was lost with its node" if code == LOST else "the coordinator was killed"
        if 0 <= code < LOST:
            reason = f"the coordinator exited with code {code}; see what it said above"
        conclude(folder, meaning(Cause.COORDINATOR_LOST).code, reason, Cause.COORDINATOR_LOST)
        return End(1, Cause.COORDINATOR_LOST, reason, None, step)


def _needs(config: Config, there: dict[str, float]) -> dict[str, Any]:
    """What Ray has to keep free for a worker; says so where the cluster has less."""
    world, threads, device = config.layout.world, config.runtime.threads, config.runtime.device
    gpus = int(device == "cuda" or (device == "auto" and there.get("GPU", 0) >= world))
    for name, wanted in (("CPU", world * threads), ("GPU", world * gpus)):
        if there.get(name, 0) < wanted:
            text = f"the run wants {wanted} {name}s and the Ray cluster has {there.get(name, 0):g}: it waits for more"
            print(f"warning: {text}", file=sys.stderr, flush=True)
    return {"num_cpus": threads, "num_gpus": gpus}


def _written(folder: RunFolder) -> tuple[int, int] | None:
    """Tells an exit.json from the one before it, which may say the same; None if there is none."""
    try:
        # NFS asks its server when a file is opened, and may not when it is only looked at.
        with (folder.path / "exit.json").open() as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _repeat(log: Path, said: int) -> int:
    """Show what a log has more than so many bytes; returns how many it has now."""
    if not log.exists():
        return said
    with log.open("rb") as file:
        file.seek(said)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return said + len(text)


def coordinate(config: dict[str, Any], run_dir: str, resume: str) -> int:
    """Be the coordinator; what the user has to correct is said, and exit code 2."""
    from scpl_dist.coordinator import service

    try:
        return service.alone(Config.model_validate(config), Path(run_dir), resume)
    except ValueError as error:
        print(f"scpl-dist: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        return service.not_begun(Path(run_dir), error)
